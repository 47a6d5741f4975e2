from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import mariotte
from mariotte.cli import console, main
from mariotte.cli.main import app, command_files, help_line, os_sentence

RUN = [sys.executable, "-c", "from mariotte.cli.main import main; main()"]
HEAVY = ("torch", "transformers", "scipy", "pandas", "sqlalchemy", "pyarrow", "altair", "numpy")


def write_command(folder: Path, name: str, body: str) -> None:
    """A command of its own file beside the real ones, in a folder that stands for theirs."""
    (folder / f"{name}.py").write_text(
        f'__all__ = ["{name}"]\n\n\ndef {name}() -> None:\n    """Do it."""\n    {body}\n'
    )


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are commands as well, found and imported like those of the package."""
    real = command_files

    def found() -> dict[str, Path]:
        return {**real(), **{file.stem.replace("_", "-"): file for file in tmp_path.glob("*.py")}}

    monkeypatch.setattr(main, "command_files", found)
    monkeypatch.setattr("mariotte.cli.__path__", [*sys.modules["mariotte.cli"].__path__, str(tmp_path)])
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(f"mariotte.cli.{file.stem}", None)


def test_every_command_has_its_help_line_on_the_help_page() -> None:
    result = CliRunner().invoke(app, ["--help"], terminal_width=200)
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    for name, file in command_files().items():
        assert help_line(file), f"{name} has no docstring"
        assert f"{name} {' '.join(help_line(file).split())}" in words


def test_commands_are_files_without_those_that_are_none() -> None:
    names = command_files()
    assert {"ls", "show", "export"} <= set(names)
    assert not {"main", "console", "--init--"} & set(names)
    assert list(names) == sorted(names)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ls", "--help"], []])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from mariotte.cli.main import main
sys.argv = ["mariotte", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]", found.stdout


@pytest.mark.parametrize("name", sorted(command_files()))
def test_help_of_each_command_matches_its_line(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert help_line(command_files()[name]) in " ".join(result.output.split())


def test_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"mariotte {mariotte.__version__}\n"


def test_an_unknown_command_is_answered_with_its_neighbours() -> None:
    result = CliRunner().invoke(app, ["exprot"])
    assert result.exit_code == 2
    assert result.stderr.startswith("mariotte: no command named 'exprot'; did you mean 'export'?")


@pytest.mark.parametrize("arguments", [["--nonsense"], ["ls", "--nonsense"], ["show"], ["ls", "extra"]])
def test_wrong_usage_exits_with_2_and_no_traceback(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ("from mariotte.errors import ChainError; raise ChainError('got 1.5: give less')", 2, "got 1.5: give less\n"),
        ("open('/none/x', 'w')", 2, "'/none/x': no such file or directory; check the path\n"),
        ("raise OSError(28, 'Full', '/full/x')", 2, "'/full/x': full; free space and run again\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; what was stored is kept"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(commands: Path, body: str, code: int, sentence: str) -> None:
    write_command(commands, "fail_here", body)
    result = CliRunner().invoke(app, ["fail-here"])
    assert result.exit_code == code
    assert result.stderr.startswith(f"mariotte: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "fail-now"], ["fail-now", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(commands: Path, arguments: list[str]) -> None:
    write_command(commands, "fail_now", "raise OSError(28, 'full')")
    assert isinstance(CliRunner().invoke(app, arguments).exception, OSError)


def test_debug_after_two_dashes_is_an_argument() -> None:
    result = CliRunner().invoke(app, ["show", "--", "--debug"])
    assert result.exit_code == 2
    assert "mariotte: no store at" in result.stderr


def test_a_bug_keeps_its_traceback(commands: Path) -> None:
    write_command(commands, "has_bug", "raise ZeroDivisionError('a bug')")
    assert isinstance(CliRunner().invoke(app, ["has-bug"]).exception, ZeroDivisionError)


def test_errors_that_libraries_derive_from_oserror_fit_in_a_line() -> None:
    class HubError(OSError):
        pass

    assert (
        os_sentence(HubError("cannot find\n the model"))
        == "cannot find the model; run again with --debug for the traceback"
    )
    assert (
        os_sentence(OSError(errno.ENOSPC, "No space left on device"))
        == "no space left on device; free space and run again"
    )


def test_help_lines_of_groups_are_read_without_import(tmp_path: Path) -> None:
    group = tmp_path / "things.py"
    group.write_text(
        '"""Of the file."""\nimport no_such_module\nthings = typer.Typer(help="Of the group.\\n\\nMore.")\n'
    )
    assert help_line(group) == "Of the group."
    group.write_text('"""Of the file."""\nthings = typer.Typer()\n')
    assert help_line(group) == "Of the file."


def test_a_group_of_commands_has_its_own(commands: Path) -> None:
    (commands / "pair.py").write_text(
        'import typer\n\n__all__ = ["pair"]\n\npair = typer.Typer(help="Two.")\n\n\n'
        '@pair.command()\ndef one() -> None:\n    """One."""\n    print("first")\n'
    )
    result = CliRunner().invoke(app, ["pair", "one"])
    assert (result.exit_code, result.stdout) == (0, "first\n")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    from mariotte.store import open_store
    from mariotte.testing.stores import make_record

    with open_store(tmp_path / "s.db", create=True) as opened:
        opened.add([make_record(n) for n in range(300)])
    return tmp_path / "s.db"


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["ls", "--json"]])
def test_a_reader_that_goes_away_is_no_error(store: Path, arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*RUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MARIOTTE_STORE": str(store)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["ls", "--help"]])
def test_a_full_disk_behind_stdout_is_one_sentence(store: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [*RUN, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"MARIOTTE_STORE": str(store)},
        )
    assert found.returncode == 2
    assert found.stderr == "mariotte: no space left on device; free space and run again\n"


def test_closed_streams_are_no_error(store: Path) -> None:
    command = f"{sys.executable} -c 'from mariotte.cli.main import main; main()' ls --store {store} >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0


def test_an_interrupted_process_says_so_and_exits_with_130(tmp_path: Path) -> None:
    """Ctrl-C while a command waits for the lock of a store."""
    code = (
        "import signal, sys, time, mariotte.cli.main as m\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def wait(ctx, args):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "m.LazyGroup.resolve_command = lambda self, ctx, args: wait(ctx, args)\n"
        "sys.argv = ['mariotte', 'ls']\nm.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.startswith("mariotte: interrupted")
    assert stderr.count("\n") == 1


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    found = subprocess.run(
        [*RUN, "ls", "--store", "ünï.db"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
    )
    assert found.returncode == 2
    assert "no store at \\xfcn\\xef.db" in found.stderr


# console


def test_tables_in_a_pipe_are_plain_and_unwrapped(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("Title", ["name", "n"], [["[bold]x[/]", 1.23456], ["y" * 300, None]], note="a note")
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("Title", "a note")
    assert lines[3].split() == ["[bold]x[/]", "1.235"]
    assert lines[4].split() == ["y" * 300, "-"]
    assert lines[3].endswith("1.235")
    assert lines[3].index("1.235") + 5 == lines[4].index("-") + 1
    assert len(lines) == 6


def test_a_table_without_rows_has_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("", ["a", "b"], [])
    assert capsys.readouterr().out.split()[:2] == ["a", "b"]


def test_cells_cannot_command_the_terminal() -> None:
    assert console.format_cell("a\x1b[2Jb\nc") == "a\\x1b[2Jb c"
    assert [console.format_cell(v) for v in (None, float("nan"), 0.000123456, 123456.7, 3, True, math.inf)] == [
        *("-", "-", "0.0001235", "123457", "3", "True", "inf")
    ]


def test_no_line_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a\x1b[2J\nb\x9b")
    console.warn("a\x1b[2J\nb")
    console.print_table("t\x07\nu", ["n"], [[1]], note="n\x07")
    console.print_json({"a\x1b": "b\x9b\x7f"})
    captured = capsys.readouterr()
    assert captured.out.startswith("a\\x1b[2J\nb\\x9b\nt\\x07 u\n")
    assert "n\\x07\n{" in captured.out
    assert json.loads(captured.out[captured.out.index("{") :]) == {"a\x1b": "b\x9b\x7f"}
    assert captured.err == "mariotte: a\\x1b[2J b\n"
    assert all(c.isprintable() or c == "\n" for c in captured.out)


def test_an_error_with_control_characters_is_one_plain_line(commands: Path) -> None:
    write_command(commands, "say_it", "from mariotte.errors import ChainError; raise ChainError('a\\x1b[2J\\nb')")
    assert CliRunner().invoke(app, ["say-it"]).stderr == "mariotte: a\\x1b[2J b\n"


def test_help_is_as_wide_as_the_terminal_up_to_a_limit_and_cuts_no_line() -> None:
    for words in (["--help"], ["fit", "--help"], ["testbed", "--help"], ["testbed", "show", "--help"]):
        for columns, widest in ((80, 80), (300, 110)):
            found = subprocess.run(
                [*RUN, *words], capture_output=True, text=True, env=os.environ | {"COLUMNS": str(columns)}, check=True
            )
            width = max(map(len, found.stdout.splitlines()))
            assert width <= widest
            assert width > widest - 15
            assert "..." not in found.stdout.partition("Commands:")[2]


def test_the_first_page_promises_no_command_that_is_not_there() -> None:
    page = CliRunner().invoke(app, ["--help"]).output
    named = set(re.findall(r"mariotte ([a-z]+)", page))
    assert named <= set(command_files())
    assert set(re.findall(r"^  ([a-z]+) {2,}", page, flags=re.M)) >= {"plan", "doctor", "run"}


def test_json_is_json_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Point:
        x: float
        where: Path

    console.print_json(
        {"p": Point(math.nan, Path("a")), "n": np.int64(3), "f": np.float64(0.1), "a": np.eye(2), 1: (2,)}
    )
    found = json.loads(capsys.readouterr().out)
    assert found == {"p": {"x": None, "where": "a"}, "n": 3, "f": 0.1, "a": [[1, 0], [0, 1]], "1": [2]}
    with pytest.raises(TypeError, match="object is not JSON"):
        console.print_json(object())


def test_progress_in_a_pipe_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with console.progress("study", 10) as update:
        for _ in range(10):
            update(text="dense")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "study: started, 10 to do",
        "study: 3 of 10, 12 s so far, about 28 s left (dense)",
        "study: 6 of 10, 24 s so far, about 16 s left (dense)",
        "study: 9 of 10, 36 s so far, about 4 s left (dense)",
        "study: done, 10 of 10 in 44 s",
    ]


def test_progress_of_an_unknown_total_and_an_end_by_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with console.progress("study") as update:
            update(completed=3)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert capsys.readouterr().err.splitlines() == ["study: started", "study: stopped at 3 after 0 s"]


def test_progress_of_what_nothing_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))

    def work(error: bool) -> None:
        with console.progress("compress") as update:
            update(0, text="prepare")
            update(0, text="apply")
            if error:
                raise ValueError

    work(error=False)
    with pytest.raises(ValueError):  # noqa: PT011
        work(error=True)
    so_far = ["compress: started", "compress: 16 s so far (apply)"]
    assert capsys.readouterr().err.splitlines() == [
        *so_far,
        "compress: done in 24 s",
        *so_far,
        "compress: stopped after 24 s",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("[study]", 4) as update:
        update(2, text="[dense]")
        update(completed=3, total=5)
    assert "[study]" in screen.getvalue()
    assert "3/5" in screen.getvalue()
    assert "[dense]" in screen.getvalue()


def test_a_terminal_gets_a_table_that_fits_it(store: Path) -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*RUN, "ls", "--store", str(store)], stdout=child, env=os.environ | {"COLUMNS": "90", "TERM": "xterm"}
    )
    os.close(child)
    text = b""
    try:
        while part := os.read(parent, 65536):
            text += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.decode())
    assert max(len(line) for line in plain.splitlines()[1:]) <= 90
    assert "testbed/none" in plain


def test_durations_are_said_as_people_do() -> None:
    assert [console.duration(s) for s in (0.4, 59, 185, 9660)] == ["0 s", "59 s", "3:05 min", "2:41 h"]


def test_narrow_spaces_are_printed_as_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    from mariotte.cli.console import say

    say("within +5\N{NARROW NO-BREAK SPACE}%\x1b[31m")
    assert capsys.readouterr().out == "within +5 %\\x1b[31m\n"
