"""A paper's sentences, checked against records: one file a paper."""

from mariotte.named import Catalogue

PAPERS = Catalogue("paper with claims", "mariotte.report.claims", "mariotte.claims", "mariotte.report.claim:Paper")
