"""What an import may cost: the desk never pays for torch, and help pays for next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mariotte


def imported_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    script = f"import sys\n{code}\nprint('MODULES', *{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_importing_mariotte_imports_nothing_heavy() -> None:
    assert not imported_after("import mariotte") & {
        "torch",
        "numpy",
        "scipy",
        "pandas",
        "sqlalchemy",
        "transformers",
        "typer",
    }


@pytest.mark.parametrize("package", ["laws", "plan", "store", "report"])
def test_the_desk_imports_no_torch(package: str) -> None:
    code = f"import mariotte.{package} as p\nfor name in p.__all__: getattr(p, name)"
    assert not imported_after(code) & {"torch", "transformers", "safetensors", "peft"}


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
sys.argv = ["mariotte", "{command}"]
from mariotte.cli.main import main
try:
    main()
except SystemExit as done:
    assert not done.code
"""
    assert not imported_after(code) & {"torch", "scipy", "pandas", "sqlalchemy", "numpy", "transformers"}


@pytest.mark.parametrize(
    "command", ["laws", "fit --help", "predict --help", "report --help", "ls --help", "export --help"]
)
def test_desk_commands_import_no_torch(command: str) -> None:
    code = f"""
sys.argv = ["mariotte", *"{command}".split()]
from mariotte.cli.main import main
try:
    main()
except SystemExit as done:
    assert not done.code
"""
    assert "torch" not in imported_after(code)


def test_every_public_name_is_there_and_the_list_is_frozen() -> None:
    assert mariotte.__all__ == [
        "Chain",
        "Counts",
        "Link",
        "MariotteError",
        "Model",
        "Record",
        "__version__",
        "compare",
        "compress_model",
        "count",
        "fit",
        "load",
        "measure",
        "open_store",
        "parse_chain",
        "plan",
        "read_budget",
        "run_study",
        "save",
        "write_report",
    ]
    for name in mariotte.__all__:
        assert getattr(mariotte, name).__doc__ if name != "__version__" else mariotte.__version__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        mariotte.compres  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
