"""Measures: what was lost."""
