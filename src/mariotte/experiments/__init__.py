"""Studies: chains expanded into a tree that shares its work, run and recorded."""
