"""Compression: pruning and quantization, one file a method."""
