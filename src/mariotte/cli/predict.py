"""``mariotte predict``: what a stored fit expects."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["predict"]


def predict(
    fit: Annotated[str, typer.Argument(metavar="FIT", help="A file written by 'mariotte fit --out'.")],
    ratio: Annotated[float, typer.Option(help="How much is compressed, as a fraction.", show_default=False)],
    tokens: Annotated[str | None, typer.Option(help="Recovery tokens, such as 64k or 10M.", show_default=False)] = None,
    base: Annotated[
        float | None,
        typer.Option(help="The dense value; by default the median of the fit's points.", show_default=False),
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="Ask for an interval at this level, such as 0.9.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the metric of a compressed model from a fit.

    Marks what lies outside the data of the fit, what lies beyond collapse, and what was asked for although the law
    ignores it. An interval comes from errors on
    points that the law had not seen; where there are too few of them the answer is 'not calibrated'.
    """
    from mariotte.chain import parse_number
    from mariotte.cli.console import print_json, print_table
    from mariotte.errors import FitError
    from mariotte.laws.result import Fit

    if not Path(fit).is_file():
        raise FitError(f"a fit is a file written by 'mariotte fit --out', there is no file {fit!r}: fit first")
    fitted = Fit.from_json(Path(fit).read_bytes())
    found = fitted.predict(
        ratio, base=base, tokens=None if tokens is None else float(parse_number(tokens)), level=level
    )
    if as_json:
        print_json({"law": fitted.law.name, "metric": fitted.report().metric, "ratio": ratio, **asdict(found)})
        return
    marks = [] if found.inside_box else ["outside the data of the fit"]
    marks += ["collapsed"] if found.collapsed else []
    marks += [found.note] if found.note else []
    interval = "-" if found.lo is None or found.hi is None else f"{found.lo:.4g} to {found.hi:.4g}"
    print_table(
        f"{fitted.law.name} on {fitted.report().metric}",
        ["ratio", "prediction", "interval" if level is None else f"{level:.0%} interval", "marks"],
        [[f"{ratio:g}", f"{found.mean:.4g}", interval, "; ".join(marks) or "none"]],
    )
