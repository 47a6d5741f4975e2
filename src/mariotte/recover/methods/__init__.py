"""One file a recovery; the file name is its name."""
