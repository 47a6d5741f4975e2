"""Conformance suites that any implementation must pass."""
