"""Benchmark scripts. Each tests one claim: it prints the machine, a table and a JSON line, and draws a plot."""
