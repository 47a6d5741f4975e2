"""Documentation that cannot drift: commands, references and snippets are checked against the code."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mariotte.cli.main import command_files, help_line
from mariotte.compress import METHODS
from mariotte.evaluate import MEASURES
from mariotte.laws import LAWS
from mariotte.recover import RECOVERIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BIBLIOGRAPHY = (ROOT / "src/mariotte/references.bib").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(command_files()))
def test_every_command_has_help_and_is_documented(command: str) -> None:
    assert help_line(command_files()[command])
    assert f"`mariotte {command}" in (ROOT / "docs/commands.md").read_text(encoding="utf-8")


def test_every_documented_command_exists() -> None:
    named = set(re.findall(r"`mariotte ([a-z]+)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert named <= set(command_files())


@pytest.mark.parametrize("catalogue", [METHODS, RECOVERIES, LAWS], ids=lambda c: c.kind)
def test_every_reference_is_in_the_bibliography(catalogue: object) -> None:
    for name in catalogue.names():
        found = catalogue.find(name)
        assert not found.reference or f"{{{found.reference}," in BIBLIOGRAPHY, f"{name}: {found.reference}"
        assert inspect.getdoc(found), name


def test_every_measure_is_documented() -> None:
    for name in MEASURES.names():
        assert inspect.getdoc(MEASURES.find(name))


def test_cited_keys_exist() -> None:
    keys = {
        key
        for path in (ROOT / "src/mariotte").rglob("*.py")
        for key in re.findall(r"\[([a-z]+\d{4}[a-z0-9]*)\]_", path.read_text(encoding="utf-8"))
    }
    assert keys
    assert not [key for key in keys if f"{{{key}," not in BIBLIOGRAPHY]


def test_every_method_and_law_is_in_the_docs() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for catalogue in (METHODS, RECOVERIES, LAWS, MEASURES):
        assert not [name for name in catalogue.names() if f"`{name}" not in text]


def snippets(language: str) -> list[object]:
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in PAGES
        if page.is_file()
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        )
    ]


@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_run(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", snippets("toml"))
def test_toml_snippets_are_studies(code: str) -> None:
    from mariotte.experiments.run import check
    from mariotte.experiments.study import parse

    assert check(parse(code)).experiments


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_project_names_no_machine() -> None:
    """No path of a build machine and no host of a package index in what is shipped."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    banned = re.compile(
        "|".join(["/" + "work/", "/" + "root/", "/" + "home/[a-z]", "pypi" + r"\.org", "python" + r"hosted\.org"])
    )
    for name in files:
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".html", ".css", ".js", ""}
            and path.is_file()
        ):
            found = banned.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{name} names {found.group() if found else ''}"
