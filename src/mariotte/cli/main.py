"""The command line: finds commands by their file names, imports the invoked one, turns errors into sentences."""

from __future__ import annotations

import ast
import difflib
import errno
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

import mariotte
from mariotte.cli.console import warn
from mariotte.errors import MariotteError

__all__ = ["app", "main"]

NOT_COMMANDS = {"main", "console"}

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
CLOSED_PIPE = 1  # what rich and typer exit with when the reader of a pipe went away

_OS_ADVICE = {
    errno.ENOSPC: "free space and run again",
    errno.EDQUOT: "free space and run again",
    errno.EROFS: "choose a folder that you may write to",
    errno.EACCES: "choose a path that you may use, or change its permissions",
    errno.EPERM: "choose a path that you may use, or change its permissions",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "choose another name, or remove it first",
    errno.EMFILE: "allow more open files (ulimit -n) and run again",
}


def command_files() -> dict[str, Path]:
    """Every command and its file, sorted by name; imports none of them."""
    files = {file.stem.replace("_", "-"): file for file in Path(__file__).parent.glob("*.py") if file.stem[0] != "_"}
    return {name: files[name] for name in sorted(files) if name not in NOT_COMMANDS}


def help_line(file: Path) -> str:
    """First line of a command's docstring, read from the file's syntax tree: importing it could mean importing torch.

    For a group of commands (a `typer.Typer`, which has no docstring) it is the first line of its ``help``, or of the
    file's docstring.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) if name == file.stem:
                text = ast.get_docstring(node)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(keywords=keywords)) if name == file.stem:
                given = [k.value.value for k in keywords if k.arg == "help" and isinstance(k.value, ast.Constant)]
                text = str(given[0]) if given else text
            case _:
                pass
    return (text or "").strip().partition("\n")[0]


def load_command(name: str, file: Path) -> Any:
    """Import a command's file and make the command of what it defines: a function, or a `typer.Typer` of several."""
    module = importlib.import_module(f"mariotte.cli.{file.stem}")
    (defined,) = module.__all__
    command = getattr(module, defined)
    if isinstance(command, typer.Typer):
        group = typer.main.get_group(command)
        group.name = name
        for each in group.commands.values():
            # Said in whole, as on the page of all commands: click would cut a help line to the width that is left.
            each.short_help = each.short_help or (each.help or "").strip().partition("\n")[0]
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(command)
    return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """The commands of this folder; only the one that is invoked is imported."""

    @override
    def list_commands(self, ctx: Any) -> list[str]:
        return list(command_files())

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the help page shows of a command: its name and its help line."""
        file = command_files().get(cmd_name)
        return None if file is None else TyperCommand(cmd_name, short_help=help_line(file), rich_markup_mode=None)

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # --debug is an option of `mariotte`, but it is remembered after a failure and so appended to the whole line.
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    @override
    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, files = args[0], command_files()
        if name in files:
            return name, load_command(name, files[name]), args[1:]
        if ctx.resilient_parsing:
            return None, None, args
        near = difflib.get_close_matches(name, files, n=2, cutoff=0.6)
        suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise MariotteError(f"no command named {name!r}{suggestion} (commands: {', '.join(files)})")

    @override
    def invoke(self, ctx: Any) -> Any:
        """Run a command; what the user can mend ends in one sentence on stderr and an exit code."""
        try:
            value = super().invoke(ctx)
            if sys.stdout is not None:  # None when the shell closed it: `mariotte ls >&-`
                sys.stdout.flush()  # here, where a full disk can still be reported
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            warn("interrupted; what was stored is kept")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(CLOSED_PIPE) from None
        except (MariotteError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            warn(str(error) if isinstance(error, MariotteError) else os_sentence(error))
            if isinstance(error, OSError) and error.filename is None:
                _forget_stdout()  # it may be what could not be written; the interpreter would try again and complain
            raise typer.Exit(USER_ERROR) from None
        return value


def os_sentence(error: OSError) -> str:
    """What the operating system refused, of which path, and what to do."""
    if error.errno is None:  # libraries derive their own errors from OSError: of the network, of a missing download
        text = " ".join(str(error).split()) or type(error).__name__
        return f"{text}; run again with --debug for the traceback"
    what = (error.strerror or str(error)).lower()
    where = "" if error.filename is None else f" {os.fspath(error.filename)!r}:"
    return f"{where} {what}; {_OS_ADVICE.get(error.errno, 'run again with --debug for the traceback')}".strip()


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not fail on it when it ends."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mariotte {mariotte.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    # Plain text: rich markup would swallow the square brackets of the chain syntax.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The compression laws of language models: compress, recover, measure what was lost, fit the law, plan by it.

    `mariotte COMMAND --help` explains a command; `mariotte quickstart` shows the whole on models that come with it.
    """


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model's name never breaks a table in an ASCII terminal
    try:
        try:
            app(prog_name="mariotte")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # of --help and --version, which end before a command is invoked
        if "--debug" in sys.argv:
            raise
        _forget_stdout()
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        warn(os_sentence(error))
        sys.exit(USER_ERROR)
