"""One file a law; the file name is its name."""
