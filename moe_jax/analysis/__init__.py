"""Analysis of compiled programs without running them, and calibration of hardware records by measurement."""
