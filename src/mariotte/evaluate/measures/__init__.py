"""One file a measure; the file name is its name."""
