"""A method, a law and a measure for Mariotte."""
