from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_records import failures, laws_study, make, runs

from mariotte.errors import MariotteError
from mariotte.report import build, usable_sentence, write
from mariotte.report.lawtable import law_reports
from mariotte.store.record import Record

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return make()


@pytest.fixture(scope="module")
def page(records: list[Record]) -> str:
    return build(records, title="A study", study="quickstart", runs=runs(), failures=failures())


class Outline(HTMLParser):
    """Checks that elements nest, and collects headings and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    found.close()
    assert not found.open
    return found


def test_the_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    found = outline(page)
    assert found.fetched == []
    assert len(page) < 4_000_000
    assert "default-src 'none'" in page  # a browser would refuse to fetch anything, too
    assert re.search(r"url\((?!data:)", page.partition("</style>")[0]) is None


def test_every_section_is_there(page: str) -> None:
    headings = " ".join(outline(page).headings).lower()
    for word in ("run", "loss", "facts", "recovery", "laws", "cost", "protocols", "care"):
        assert word in headings, word


def test_sections_without_data_are_left_out(records: list[Record]) -> None:
    losses = [r for r in records if r.measure.startswith("loss") and r.recovery is None]
    headings = " ".join(outline(build(losses)).headings).lower()
    assert "facts" not in headings
    assert "recovery" not in headings


def test_one_dense_record_is_enough(records: list[Record]) -> None:
    html = build([r for r in records if r.method is None][:1])
    assert "nothing can be said about what may be removed" in html
    outline(html)


def test_names_cannot_become_markup(records: list[Record]) -> None:
    evil = "<script>alert(1)</script>"
    hostile = [dataclasses.replace(r, model=evil, model_type=evil, unit=evil) for r in records[:40]]
    html = build(hostile, title=evil, study=evil)
    assert evil not in html
    assert "&lt;script&gt;alert(1)" in html
    outline(html)


def test_the_headline_is_true_of_the_records(records: list[Record]) -> None:
    sentence = usable_sentence(records, allowance=0.05)
    chain = re.search(r"loss on testbed/all, (\w+)@([\d.]+)", sentence)
    assert chain, sentence
    method, amount = chain.group(1), float(chain.group(2))
    model = re.search(r"parameters of (\S+) ", sentence)
    assert model
    own = [
        r
        for r in records
        if (r.method, r.model, r.recovery) == (method, model.group(1), None) and r.measure.startswith("loss")
    ]
    milder = [r for r in own if r.amount is not None and r.amount <= amount - 0.1]
    harder = [r for r in own if r.amount is not None and r.amount >= amount + 0.1]
    assert all(r.metrics["loss"] < 1.07 * r.base["loss"] for r in milder)
    assert all(r.metrics["loss"] > 1.03 * r.base["loss"] for r in harder)


def test_laws_are_held_out_and_fitted(records: list[Record]) -> None:
    qwen2, llama = law_reports(records)  # other tokenizers are other protocols, which are never pooled
    assert (len(qwen2.fits), len(llama.fits)) == (2 * 4, 4)
    for report in (qwen2, llama):
        assert {row.law for row in report.holdout} >= {"compression-law", "pruning-law", "line", "persist"}
        assert sum(row.best for row in report.holdout) == 1
    assert law_reports([r for r in records if r.method is None]) == []


def test_laws_of_the_share_removed_are_not_fitted_to_bits(records: list[Record]) -> None:
    """A quantizer removes nothing, and before a cut that is quantized too there is no dense model."""
    cuts = [r for r in records if r.recovery is None]
    bits = {"name": "rtn", "family": "quantization", "unit": "bits", "amount": 3}
    quantized = [
        dataclasses.replace(
            r, id=r.id[::-1], chain=f"{r.chain} | rtn@3", method=r.method or "rtn", steps=(*r.steps, bits)
        )
        for r in cuts
        if r.chain != "dense"
    ]
    alone = [
        dataclasses.replace(
            r, id=f"{r.id}{n}", chain=f"rtn@{n}", method="rtn", family="quantization", unit="bits", amount=n
        )
        for r in cuts
        if r.chain == "dense"
        for n in (2, 3, 4)
    ]
    assert law_reports([*records, *quantized, *alone]) == law_reports(records)


def test_the_formula_is_told_once(page: str) -> None:
    """Every series of the largest report is fitted by the same law."""
    assert 1 <= page.count("smooth residual") <= 2  # one table of fits for each of two tokenizers


def test_failures_are_listed(page: str) -> None:
    assert "widths must be multiples of 8; nearest is 8" in page


def test_no_records_is_one_sentence() -> None:
    with pytest.raises(MariotteError, match="a report needs records, got none"):
        build([])


def test_write_is_whole_or_nothing(records: list[Record], tmp_path: Path) -> None:
    path = write(records[:30], tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(MariotteError, match="the report cannot be written"):
        write(records[:30], tmp_path / "file" / "report.html")


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--dump-dom",
    *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
]


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install it to open the report in a browser"
)


def opened(page: str, size: str, folder: Path) -> str:
    """The page's elements after a browser has drawn it, which must not complain."""
    assert CHROMIUM is not None
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--window-size={size}", f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return done.stdout


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("size", ["1280,2000", "390,2000"])
def test_a_browser_draws_every_figure_without_an_error(page: str, size: str, tmp_path: Path) -> None:
    elements = opened(page, size, tmp_path)
    figures = page.count('<script type="application/json" id="data-')
    assert figures == 3
    assert f'data-drawn="{figures}"' in elements
    # Three models a figure: each panel is an SVG with a mark for every line drawn.
    panels = re.findall(r'<div class="plot[^"]*"[^>]*>.*?</svg>', elements, flags=re.S)
    assert len(panels) == 3 * figures
    for panel in panels:
        assert len(re.findall(r'<path[^>]+d="M[^"]{20,}"', panel)) >= 2


PRESS = """
addEventListener("load", async () => {
  const until = async (done) => { while (!done()) await new Promise((wait) => setTimeout(wait, 20)); };
  await until(() => document.documentElement.dataset.drawn);
  let drawn = 0, wide = 0;
  for (const figure of document.querySelectorAll(".figure")) {
    for (const button of figure.querySelectorAll("[data-answer]")) {
      delete figure.dataset.drawn;
      button.click();
      await until(() => figure.dataset.drawn !== undefined);
      const panels = [...figure.querySelectorAll(".panel")];
      if (!panels.length || panels.some((panel) => !panel.querySelector("svg path[aria-roledescription]")))
        console.error(`nothing is drawn after ${button.textContent}`);
      drawn += panels.length;
    }
    for (const key of figure.querySelectorAll(".key:not([hidden])")) key.click();
  }
  document.querySelectorAll("details").forEach((fold) => (fold.open = true));
  await new Promise((wait) => setTimeout(wait, 100));
  if (document.documentElement.scrollWidth > innerWidth) wide = document.documentElement.scrollWidth;
  Object.assign(document.documentElement.dataset, { pressed: drawn, wide });
});
"""


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("size", ["1280,2000", "500,2000"])  # narrower than 500 a window cannot be asked for
def test_every_button_draws_and_no_table_widens_the_page(size: str, tmp_path: Path) -> None:
    models = ("testbed/qwen2-113k", "testbed/llama-483k")
    page = build([record for record in laws_study() if record.model in models])
    # The page's own policy refuses scripts that are not its own, as it should: here it has to be without one.
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
    assert policy
    page = page.replace(policy.group(), "") + f"<script>{PRESS}</script>"
    elements = opened(page, size, tmp_path)
    pressed = re.search(r'data-pressed="(\d+)"', elements)
    assert pressed
    assert int(pressed.group(1)) > 40
    assert 'data-wide="0"' in elements
