"""Compression: pruning and quantization, one file a method."""

from mariotte.named import Catalogue

METHODS = Catalogue("method", "mariotte.compress.methods", "mariotte.methods", "mariotte.models.step:Step")
"""Every compression method by its name."""

__all__ = ["METHODS"]
