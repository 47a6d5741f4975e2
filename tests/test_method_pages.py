"""Every method and recovery has a page, whose generated part is what the class says today."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mariotte.chain import parse
from mariotte.experiments.identity import resolve
from mariotte.testbed.zoo import CLOZE_NAMES, NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
COMMAND = re.compile(r'^mariotte compress (\S+) "([^"]+)"( --calibration \S+)?( --device \S+ --dtype \S+)? --out \S+$')


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_page_is_stale_or_missing(generate: ModuleType) -> None:
    assert sorted(generate.stale()) == [], "run python docs/generate.py, and write the advice of a page that is new"


def test_a_page_that_is_stale_missing_or_of_nothing_is_found(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: generate.find_step(name) for name in ("int8", "rtn", "magnitude")}
    monkeypatch.setattr(generate, "PAGES", tmp_path)
    monkeypatch.setattr(generate, "methods", lambda: chosen)
    for name in ("int8", "magnitude"):
        text = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
        # Links lead to methods that there are, and there are three here.
        text = generate.page(name, chosen[name], text)
        (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")
    (tmp_path / "zip.md").write_text("# zip", encoding="utf-8")
    aged = (tmp_path / "magnitude.md").read_text(encoding="utf-8").replace("| Amount | share", "| Amount | part")
    (tmp_path / "magnitude.md").write_text(aged, encoding="utf-8")
    found = generate.stale()
    assert sorted(found) == ["magnitude.md", "rtn.md", "zip.md"]
    assert "| Amount | share" in found["magnitude.md"]
    assert "# `rtn`" in found["rtn.md"]
    assert "To be written." in found["rtn.md"]
    (tmp_path / "magnitude.md").write_text("# magnitude", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"magnitude\.md needs one block"):
        generate.stale()


def test_what_is_written_by_hand_stays(generate: ModuleType) -> None:
    text = "before\n" + "\n".join(
        f"{generate.OPEN.format(block)}\nold\n{generate.CLOSE}\nadvice on {block}" for block in ("head", "details")
    )
    made = generate.page("int8", generate.find_step("int8"), text)
    assert made.startswith("before\n")
    assert "advice on head" in made
    assert made.endswith("advice on details")
    assert "old" not in made.split("\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_gives_advice(generate: ModuleType, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "To be written" not in text
    parts = dict(re.findall(r"^## ([^\n]+)\n\n(.+?)(?=\n## |\n<!-- generated|\Z)", text, flags=re.M | re.S))
    for title in generate.BY_HAND:
        assert len(parts[title].split()) >= 5, f"{title} says nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_chains(page: Path) -> None:
    """What is shown can be asked for, and shows the method."""
    text = page.read_text(encoding="utf-8")
    commands = [
        line for block in re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S) for line in block.splitlines()
    ]
    assert commands, "a page shows how the method is asked for"
    for line in commands:
        asked = COMMAND.match(line)
        assert asked, line
        assert page.stem in {link.name for link in parse(asked.group(2)).links}
        assert resolve(parse(asked.group(2)))
        corpus, _, model = asked.group(1).rpartition("/")
        assert corpus != "testbed" or model in (*NAMES, *CLOZE_NAMES)


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ +- ([\w-]+): methods/([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert all(title == file for title, file in named)
    assert sorted(file for _, file in named) == sorted(page.stem for page in PAGES)
