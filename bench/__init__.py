"""One claim per script: each prints a table and one JSON line, draws a plot, and says what it ran on."""
