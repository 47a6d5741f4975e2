"""Corpora and the packed blocks of tokens made of them."""
