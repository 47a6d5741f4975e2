"""Records and where they are kept: all that the desk knows of the bench."""
