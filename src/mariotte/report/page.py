"""The page: records in, one HTML file out that needs nothing else and asks nobody."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import os
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from mariotte.errors import MariotteError
from mariotte.report.chart import Figure
from mariotte.report.sections import ALLOWANCE, Section, of_testbed, sections_of
from mariotte.report.summary import usable_sentences
from mariotte.store.record import Failure, Record


def build(
    records: Iterable[Record],
    *,
    title: str | None = None,
    study: str | None = None,
    runs: Iterable[Mapping[str, Any]] = (),
    failures: Iterable[Failure] = (),
    claims: Iterable[str] = (),
) -> str:
    """The report of some records as one HTML page.

    Parameters
    ----------
    records : of any models, methods, measures and seeds; at least one
    title : heading; by default it names the models
    study : name of the study, shown above the heading
    runs : what the invocations did, as a store's ``runs()`` gives them
    failures : experiments that left no record
    claims : papers whose sentences are checked, such as ``compression-laws``; beside those that the studies of `runs`
        say they follow

    Returns
    -------
    HTML with style, script and figures inside; a browser opens it without a network

    Raises
    ------
    MariotteError
        When there are no records.
    """
    records, failures, runs = list(records), list(failures), list(runs)
    if not records:
        raise MariotteError(
            "a report needs records, got none: run a study first, or check the store and the study's name"
        )
    return render(
        title or _title(records),
        sections_of(records, runs, failures, followed(runs, claims)),
        sentences=usable_sentences(records, allowance=ALLOWANCE),
        eyebrow="Compression report" + (f" · study {study}" if study else ""),
        synthetic=of_testbed(records),
    )


def render(
    title: str, sections: Sequence[Section], *, sentences: Sequence[str], eyebrow: str, synthetic: bool = False
) -> str:
    """A page of sections, complete in itself.

    Parameters
    ----------
    title, eyebrow : heading, and the line above it
    sentences : what to take away, in the box below the heading
    synthetic : say that the models are the testbed's
    """
    from mariotte import __version__

    script = _asset("figures.js")
    runtime = _runtime() if any(section.figure for section in sections) else ""
    page = _environment().get_template("page.html")
    return page.render(
        title=title,
        eyebrow=eyebrow,
        synthetic=synthetic,
        sentences=sentences,
        sections=sections,
        version=__version__,
        style=Markup(_asset("style.css")),
        script=Markup(script),
        runtime=Markup(runtime),
        script_hashes=Markup(" ".join(_hash(text) for text in (script, runtime) if text)),
    )


def write(
    records: Iterable[Record],
    path: str | Path,
    *,
    title: str | None = None,
    study: str | None = None,
    runs: Iterable[Mapping[str, Any]] = (),
    failures: Iterable[Failure] = (),
    claims: Iterable[str] = (),
) -> Path:
    """Write the report to `path`, completely or not at all; see `build`.

    Returns
    -------
    the path, absolute

    Raises
    ------
    MariotteError
        When there are no records or the file cannot be written.
    """
    html = build(records, title=title, study=study, runs=runs, failures=failures, claims=claims)
    return save(html, path)


def save(html: str, path: str | Path) -> Path:
    """Write a page to `path`, completely or not at all.

    Returns
    -------
    the path, absolute

    Raises
    ------
    MariotteError
        When the file cannot be written.
    """
    target = Path(path).expanduser().resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        unfinished = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(html)
            # mkstemp makes files that only their owner reads; a report is meant to be passed on.
            unfinished.chmod(0o644)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise MariotteError(
            f"the report cannot be written to {target}: {error.strerror or error}; name another file"
        ) from error
    return target


def followed(runs: Iterable[Mapping[str, Any]], asked: Iterable[str] = ()) -> list[str]:
    """The papers whose claims a page checks: those asked for, and those that the studies say they follow."""
    texts = dict.fromkeys(str(run.get("toml") or "") for run in runs)
    stated = [str(tomllib.loads(text).get("follows") or "") for text in texts]
    return [name for name in dict.fromkeys([*asked, *stated]) if name]


def _title(records: Sequence[Record]) -> str:
    models = list(dict.fromkeys(record.model for record in records))
    return f"How {models[0]} gives way" if len(models) == 1 else f"How {len(models)} models give way to compression"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mariotte.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["json"] = _embedded_json
    return environment


def _embedded_json(figure: Figure) -> Markup:
    """A figure as JSON that can stand inside a script element: no text in it can end the element."""
    return jinja2.utils.htmlsafe_json_dumps(dataclasses.asdict(figure), separators=(",", ":"))


def _asset(name: str) -> str:
    return resources.files("mariotte.report").joinpath("templates", name).read_text(encoding="utf-8")


@functools.cache
def _runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that Altair writes specifications for."""
    wanted = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    same_major = [version for version in known if version.split(".")[0] == wanted.split(".")[0]]
    if not same_major:
        raise MariotteError(
            f"the figures need a Vega-Lite {wanted} runtime, this vl-convert-python has "
            f"{', '.join(known)}: install a newer vl-convert-python"
        )
    version = wanted if wanted in known else same_major[-1]
    # Its stub asks for a snippet, which the function itself does not.
    bundle = cast(str, vl_convert.javascript_bundle(vl_version=version))  # pyright: ignore[reportCallIssue]
    assert "</script" not in bundle.lower(), "the runtime would end its own script element"
    return bundle


def _hash(text: str) -> str:
    """The source expression by which the page's security policy admits exactly this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
