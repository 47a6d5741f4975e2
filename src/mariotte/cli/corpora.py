"""``mariotte corpora``: text that can be named."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mariotte.cli.console import print_json, print_table

__all__ = ["corpora"]


def corpora(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the corpora that can be named, and where each would come from."""
    from mariotte.data.corpora import CORPORA, Folder, Hub, find

    def source(name: str) -> str:
        corpus = find(name)
        if isinstance(corpus, Folder):
            return str(corpus.path)
        return f"hub: {corpus.dataset}" if isinstance(corpus, Hub) else "comes with the package"

    found = [{"name": name, "source": source(name), "block": corpus.block} for name, corpus in CORPORA.items()]
    if as_json:
        print_json(found)
        return
    folder = os.environ.get("MARIOTTE_DATA") or "not set"
    note = f"MARIOTTE_DATA is {folder}; file:PATH names any text or jsonl file or folder"
    print_table(
        "", ["corpus", "source", "tokens a window"], [[f["name"], f["source"], f["block"]] for f in found], note
    )
