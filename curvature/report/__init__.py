"""A comparison for readers: in words, tables, plots and one HTML page."""
