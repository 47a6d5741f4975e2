"""Recovery: fine-tuning that wins back what compression lost."""

from mariotte.named import Catalogue

__all__ = ["RECOVERIES"]

RECOVERIES = Catalogue("recovery", "mariotte.recover.methods", "mariotte.recoveries", "mariotte.models.step:Step")
"""Recoveries by name: each is one file of `mariotte.recover.methods`."""
