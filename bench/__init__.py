"""One claim per script. Each prints a table and one JSON line, and says what it ran on."""
