"""One file a compression method; the file name is the method's name."""
