"""A matmul per group of rows."""
