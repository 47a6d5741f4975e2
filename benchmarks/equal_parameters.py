"""Structured methods at equal parameters, nothing recovered: loss and facts kept with 10 to 50 % of a model removed.

python benchmarks/equal_parameters.py qwen2-1m llama-1m qwen2-2m
python benchmarks/equal_parameters.py stories260K --data SHARED_DATA

Each model's section of benchmarks/results/equal_parameters.md is replaced when the model is run; the others stay.
SHARED_DATA holds models/stories260K and tinystories/tinystories_sample.txt, one token stream without special tokens,
cut into windows of 256: the first 128 calibrate, the last 200 test. Testbed models calibrate on 128 rows of 64 tokens
of testbed/all and are tested on all rows of its test split and on all facts.

With --cache FOLDER what each method made of each model is kept there, and not done again: an interrupted run goes on,
and a method whose file is removed is done anew.

All amounts are shares of the dense model's parameters, a tied embedding counted once. Widths are rounded to 1, so that
what is removed is equal; methods that take whole blocks or heads come as near as they can.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mariotte import __version__
from mariotte.data import corpora, tokens
from mariotte.errors import MariotteError
from mariotte.evaluate.measures.knowledge import Knowledge
from mariotte.experiments import identity
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, apply_at, prepare_once

RESULTS = Path(__file__).parent / "results" / "equal_parameters.md"
METHODS = ("shortgpt", "heads", "ffn", "slice", "slicegpt", "prunenet-random", "prunenet", "auto")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
WITH_A_QUARTER = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
"""For stories260K, on which other programs were measured at 25 %."""
SEED = 0
SHORT = 0.005
"""A method that removed less than was asked for by more than this share is shown, and not compared with."""


@dataclass(frozen=True)
class Case:
    """A model with its text.

    Parameters
    ----------
    text : said of the data in the section's head
    calibration_NT, test_NT : tokens
    knowledge : facts to ask; None without
    """

    model: Model
    text: str
    calibration_NT: Tensor
    test_NT: Tensor
    knowledge: Knowledge | None


@dataclass(frozen=True)
class Found:
    """What one method made of one model at one ratio.

    Parameters
    ----------
    removed : share of the dense model's parameters
    nll_N : mean loss of each test row
    known : facts that it tells and the dense model told; None without facts
    """

    chain: str
    removed: float
    nll_N: Tensor
    known: frozenset[str] | None
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        known = None if self.known is None else sorted(self.known)
        return {**self.__dict__, "nll_N": self.nll_N.tolist(), "known": known}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Found:
        """What `to_dict` wrote."""
        known = None if given["known"] is None else frozenset(given["known"])
        return cls(**{**given, "nll_N": torch.tensor(given["nll_N"], dtype=torch.float64), "known": known})

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nll_N.mean())


def stories(data: Path) -> Case:
    model = load(data / "models" / "stories260K")
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    said = "TinyStories sample, windows of 256 tokens: the first 128 calibrate, the last 200 test"
    return Case(model, said, rows[:128], rows[-200:], None)


def testbed(name: str) -> Case:
    model, corpus = load(f"testbed/{name}"), corpora.find("testbed/all")
    calibration = tokens.blocks(corpus, "calibration", model.tokenizer, 64, 128)
    test = tokens.blocks(corpus, "test", model.tokenizer, 64)
    said = f"testbed/all, rows of 64 tokens: 128 of calibration, {len(test):,} of test; all facts of the world"
    return Case(model, said, calibration, test, Knowledge(on="testbed"))


def known_facts(case: Case, model: Model) -> frozenset[str] | None:
    """Facts that a model tells when asked as in training."""
    return None if case.knowledge is None else frozenset(case.knowledge.measure(model).details["known"])


def dense_of(case: Case) -> Found:
    """The uncut model, which the others are compared with."""
    return Found("dense", 0.0, row_losses(case.model, case.test_NT), known_facts(case, case.model), 0.0)


def row_losses(model: Model, test_NT: Tensor) -> Tensor:
    return token_nll(model, test_NT, batch=max(1, 4096 // test_NT.shape[1])).double().mean(1)


def run(case: Case, name: str, ratios: Sequence[float], dense: Found, **asked: object) -> list[Found | str]:
    """One method, with fields other than its defaults, at all ratios; in place of what it cannot do, why."""
    kind = identity.find_step(name)
    settings: dict[str, object] = {"round_to": 1} if "round_to" in {f.name for f in fields(kind)} else {}
    step = kind(**settings, **asked, **({} if name == "auto" else {"of": "model"}))
    if reason := step.refuse(case.model):
        return [f"refused: {reason}"] * len(ratios)
    found: list[Found | str] = []
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(dense=case.model, scratch=Path(scratch), seed=SEED, calibration=case.calibration_NT)
        for ratio in ratios:
            started = time.perf_counter()
            try:
                prepared = prepare_once(step, case.model, context, [ratio])
                cut = apply_at(step, case.model, prepared, ratio, context)
            except MariotteError as error:
                found.append(str(error))
                continue
            seconds = time.perf_counter() - started
            removed = 1 - cut.counts.n_params / case.model.counts.n_params
            known = known_facts(case, cut)
            kept = None if known is None or dense.known is None else known & dense.known
            chain = str(cut.done[-1].facts.get("chain", step.link(ratio)))
            found.append(Found(chain, removed, row_losses(cut, case.test_NT), kept, seconds))
            print(f"  {step.link(ratio)}: {removed:.1%} removed, loss {found[-1].loss:.4f}, {chain}", flush=True)
    return found


def cached(cache: Path | None, key: str, work: Callable[[], list[Found | str]]) -> list[Found | str]:
    """What `work` finds, from a file of the cache where it is there."""
    file = None if cache is None else cache / f"{key}.json"
    if file is not None and file.is_file():
        stored = cast("list[Any]", json.loads(file.read_text(encoding="utf-8")))
        return [found if isinstance(found, str) else Found.from_dict(found) for found in stored]
    results = work()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([found if isinstance(found, str) else found.to_dict() for found in results])
        file.write_text(text, encoding="utf-8")
    return results


def paired(one: Found, other: Found) -> tuple[float, float]:
    """How much more one loses than another, nats a token, and twice the standard error of that over rows."""
    difference_N = one.nll_N - other.nll_N
    return float(difference_N.mean()), 2 * float(difference_N.std() / len(difference_N) ** 0.5)


def compared(found: dict[str, Found], ratio: float, dense: Found) -> str:
    """How auto stands against the best of the others, in loss and in facts, with twice the paired standard error."""
    auto = found["auto"]
    others = {n: f for n, f in found.items() if n != "auto" and f.removed >= ratio - SHORT}
    if not others:
        return "alone"
    name = min(others, key=lambda n: others[n].loss)
    mean, noise = paired(auto, others[name])
    text = f"{mean:+.3f} to {name}: {verdict(mean, noise)}"
    if auto.known is not None and dense.known:
        name = max(others, key=lambda n: len(others[n].known or ()))
        other, asked = others[name].known or frozenset[str](), len(dense.known)
        gained, lost = len(auto.known - other), len(other - auto.known)
        difference = (gained - lost) / asked
        # The facts on which the two differ, each a coin: what McNemar's test counts.
        said = verdict(-difference, 2 * (gained + lost) ** 0.5 / asked)
        text += f"; facts {difference:+.1%} to {name}: {said}"
    return text


def verdict(worse: float, noise: float) -> str:
    return "best" if worse <= 0 else "within noise" if worse <= noise else "worse"


def heading(name: str, case: Case, dense: Found, columns: Sequence[str]) -> list[str]:
    """The first lines of a model's part of the results, the head of its table among them."""
    facts = "" if dense.known is None else f", {len(dense.known):,} facts known"
    return [
        f"## {name}",
        "",
        f"{case.model.counts.n_params:,} parameters, dense loss {dense.loss:.4f}{facts}. {case.text}. Seed {SEED}.",
        "",
        f"| removed | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]


def cell(found: Found, dense: Found, ratio: float, *, loss: str, facts: str) -> str:
    """Loss, facts kept, and what was removed where it is not the ratio; `loss` and `facts` say how numbers look."""
    kept = "" if found.known is None or not dense.known else f", {len(found.known) / len(dense.known):{facts}}"
    exact = "" if abs(found.removed - ratio) < SHORT else f" ({found.removed:.1%})"
    return f"{found.loss:{loss}}{kept}{exact}"


def section(name: str, case: Case, ratios: Sequence[float], cache: Path | None = None) -> str:
    """The model's part of the results."""
    dense = dense_of(case)
    by_method = {
        method: cached(
            cache, "-".join([name, method, *map(str, ratios)]), functools.partial(run, case, method, ratios, dense)
        )
        for method in METHODS
    }
    lines = heading(name, case, dense, [*METHODS, "auto against the best other"])
    notes: list[str] = []
    refused: dict[str, str] = {}
    for i, ratio in enumerate(ratios):
        cells: list[str] = []
        at: dict[str, Found] = {}
        for method, results in by_method.items():
            result = results[i]
            if isinstance(result, str):
                cells.append("cannot")
                refused.setdefault(
                    method, result.replace(case.model.name, name)
                )  # the first says why for all larger ratios
                continue
            at[method] = result
            cells.append(cell(result, dense, ratio, loss=".3f", facts=".0%"))
        lines.append(f"| {ratio:.0%} | {' | '.join(cells)} | {compared(at, ratio, dense) if 'auto' in at else ''} |")
        if "auto" in at:
            notes.append(f"* auto at {ratio:.0%}: `{at['auto'].chain}`, {at['auto'].seconds:.0f} s.")
    return "\n".join([*lines, "", *notes, *(f"* {method}: {why}." for method, why in refused.items()), ""])


HEAD = f"""# Structured methods at equal parameters

Loss on test text and, for testbed models, the share of the dense model's facts that are kept, after a share of all
parameters (a tied embedding once) was removed, nothing recovered. Made by `benchmarks/equal_parameters.py`, whose head
says the protocol; widths are rounded to 1; a share in brackets is what was removed where it is not what was asked.
auto is compared with the best of the methods that removed at least as much: within noise means by no more than two
standard errors of the paired difference over test rows, or of the facts on which the two differ. Mariotte
{__version__}, torch {torch.__version__}, one thread of a shared machine with two CPU cores, 2026-11-22; the seconds are
those of the search and the cut.
"""


def write(name: str, text: str, results: Path = RESULTS, head: str = HEAD) -> None:
    """Put one model's section into a file of results."""
    results.parent.mkdir(exist_ok=True)
    old = results.read_text(encoding="utf-8") if results.is_file() else ""
    sections = {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in re.split(r"^## ", old, flags=re.M)[1:]}
    sections[name] = text
    results.write_text("\n".join([head, *(sections[key] for key in sorted(sections))]), encoding="utf-8")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every benchmark of this protocol is asked: which models, and where the text of stories260K is."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="stories260K, or names of testbed models")
    parser.add_argument("--data", type=Path, help="folder with models/ and tinystories/, for stories260K")
    return parser


def cases(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """The models that were asked for, one at a time, on one thread."""
    if "stories260K" in given.models and given.data is None:
        parser.error("stories260K needs --data")
    torch.set_num_threads(1)
    for name in given.models:
        yield name, stories(given.data) if name == "stories260K" else testbed(name)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+")
    parser.add_argument("--cache", type=Path, help="folder for what was done")
    given = parser.parse_args()
    for name, case in cases(parser, given):
        usual = WITH_A_QUARTER if name == "stories260K" else RATIOS
        text = section(name, case, given.ratios or usual, given.cache)
        print(text)
        if given.ratios is None:
            write(name, text)


if __name__ == "__main__":
    main()
