"""Compression laws: forms, fits, hold-out."""
