"""Measures: what was lost."""

from mariotte.named import Catalogue

MEASURES = Catalogue("measure", "mariotte.evaluate.measures", "mariotte.measures", "mariotte.evaluate.base:Measure")
