"""The executed notebook of the docs: its cells run, and print what is stored beside them."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "laws" / "defects.ipynb"


def test_the_notebook_of_defects_prints_what_it_shows():
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    space: dict[str, object] = {}
    shown = 0
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            exec(compile("".join(cell["source"]), "defects.ipynb", "exec"), space)
        stored = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
        assert printed.getvalue() == stored
        shown += len(stored.splitlines())
        assert cell["outputs"]
    assert shown >= 20
    assert sum("image/svg+xml" in o.get("data", {}) for c in cells for o in c["outputs"]) == 2
