"""Packages of other people: the example is installed and used, and what breaks the contract is told in a sentence."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mariotte
from mariotte import named
from mariotte.cli.main import main
from mariotte.compress import METHODS
from mariotte.errors import PluginError
from mariotte.evaluate import MEASURES
from mariotte.laws import LAWS

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "plugin"


def test_the_example_is_installed_conforms_and_runs(tmp_path: Path) -> None:
    pytest.importorskip(
        "hatchling", reason="hatchling, which builds the example, is not installed: pip install hatchling"
    )
    pytest.importorskip("pip", reason="pip, which installs the example, is not there")
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    pip += ["--disable-pip-version-check", "--target", str(target), str(source)]
    installed = subprocess.run(pip, capture_output=True, text=True, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    assert (target / "mariotte_example" / "tangent.py").is_file()
    package = str(Path(mariotte.__file__).resolve().parent.parent)
    path = os.pathsep.join([str(target), package, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        capture_output=True,
        text=True,
        cwd=source,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


Plugin = Callable[..., None]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Install a package of one module, declared under a name in a group: called with its text, and where it is said
    to be."""

    def install(
        text: str, name: str = "odd-one", group: str = "methods", at: str | None = None, by: str = "thirdparty"
    ) -> None:
        folder = tmp_path / by
        (folder / by).mkdir(parents=True)
        (folder / by / "__init__.py").write_text("")
        (folder / by / f"{name.replace('-', '_')}.py").write_text(text)
        info = folder / f"{by}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {by}\nVersion: 1.0\n")
        value = at or f"{by}.{name.replace('-', '_')}"
        (info / "entry_points.txt").write_text(f"[mariotte.{group}]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        named._plugins.cache_clear()

    yield install
    named._plugins.cache_clear()
    for module in [m for m in sys.modules if m.startswith(("thirdparty", "fourthparty"))]:
        del sys.modules[module]


GOOD = """
from mariotte.compress.methods.rtn import RTN
from mariotte.compress.quantize import Grouped
__all__ = ["Odd"]
class Odd(Grouped):
    reference = ""
    def rounded(self, weight_OI, bits, scales):
        return weight_OI
"""
TOLD = "uninstall thirdparty, or have its author mend it"
WHAT = "the method 'odd-one' of the package thirdparty"


def test_a_plugin_that_keeps_the_contract_is_found_by_name_and_listed(plugin: Plugin) -> None:
    plugin(GOOD)
    assert "odd-one" in METHODS.names()
    assert METHODS.find("odd-one").name() == "odd-one"


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        (
            "import no_such_thing",
            None,
            f"{WHAT} must be imported from thirdparty.odd_one, which fails (ModuleNotFoundError: No module named "
            f"'no_such_thing'): {TOLD}",
        ),
        (
            "raise SyntaxError('two\\nlines')",
            None,
            f"{WHAT} must be imported from thirdparty.odd_one, which fails (SyntaxError: two lines): {TOLD}",
        ),
        (
            GOOD.replace("__all__", "_all"),
            None,
            f"{WHAT} needs an __all__ with the name of one class, and thirdparty.odd_one has none: {TOLD}",
        ),
        (
            GOOD.replace('["Odd"]', '["Odd", "RTN"]'),
            None,
            f"{WHAT} needs an __all__ with the name of one class, and thirdparty.odd_one has ['Odd', 'RTN']: {TOLD}",
        ),
        (
            GOOD.replace('["Odd"]', '["Even"]'),
            None,
            f"{WHAT} needs an __all__ with the name of one class, and thirdparty.odd_one has ['Even']: {TOLD}",
        ),
        (
            "__all__ = ['Odd']\nclass Odd:\n    pass",
            None,
            f"{WHAT} must be a Step of mariotte.models.step, and thirdparty.odd_one defines "
            f"<class 'thirdparty.odd_one.Odd'>: {TOLD}",
        ),
        (
            "__all__ = ['Odd']\nOdd = 3",
            None,
            f"{WHAT} must be a Step of mariotte.models.step, and thirdparty.odd_one defines 3: {TOLD}",
        ),
        (
            "from mariotte.models.step import Step\n__all__ = ['Odd']\nclass Odd(Step):\n    unit = 'bits'",
            None,
            f"{WHAT} must define all that a Step does, and Odd lacks apply, prepare: {TOLD}",
        ),
        (
            GOOD,
            "thirdparty.odd_one:Odd",
            f"{WHAT} must be in a module of that name, ending in odd_one, and its entry point names "
            f"thirdparty.odd_one:Odd: {TOLD}",
        ),
        (
            GOOD,
            "thirdparty",
            f"{WHAT} must be in a module of that name, ending in odd_one, and its entry point names thirdparty: {TOLD}",
        ),
    ],
)
def test_what_breaks_the_contract_is_told_in_a_sentence(plugin: Plugin, text: str, at: str | None, said: str) -> None:
    plugin(text, at=at)
    with pytest.raises(PluginError) as raised:
        METHODS.find("odd-one")
    assert str(raised.value) == said


@pytest.mark.parametrize(("catalogue", "group", "base"), [(LAWS, "laws", "Law"), (MEASURES, "measures", "Measure")])
def test_laws_and_measures_are_checked_likewise(
    plugin: Plugin, catalogue: named.Catalogue, group: str, base: str
) -> None:
    plugin("__all__ = ['Odd']\nclass Odd:\n    pass", group=group)
    with pytest.raises(
        PluginError, match=rf"^the {catalogue.kind} 'odd-one' of the package thirdparty must be a {base} of"
    ):
        catalogue.find("odd-one")


def test_a_name_that_is_taken_is_refused(plugin: Plugin) -> None:
    plugin(GOOD, name="rtn")
    with pytest.raises(PluginError) as raised:
        METHODS.find("rtn")
    assert str(raised.value) == (
        "a name must be one method's alone, and 'rtn' is that of one in mariotte and of one in thirdparty: "
        "uninstall thirdparty, or have its author take another name"
    )


def test_a_name_that_two_packages_use_is_refused(plugin: Plugin) -> None:
    plugin(GOOD)
    plugin(GOOD, by="fourthparty")
    with pytest.raises(
        PluginError, match="'odd-one' is that of one in fourthparty and of one in thirdparty: uninstall t"
    ):
        METHODS.find("odd-one")


def test_the_command_line_says_it_in_one_line_and_ends_with_2(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin("import no_such_thing")
    monkeypatch.setattr(sys, "argv", ["mariotte", "methods"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert WHAT in " ".join(said.split())
    assert "Traceback" not in said
