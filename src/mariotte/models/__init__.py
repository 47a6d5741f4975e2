"""Models seen through their architecture entry, loaded, saved and scored."""
