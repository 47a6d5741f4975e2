"""Two models beside each other: what one lost against the other, on the same items, and whether that is chance.

What is measured of both; `mariotte.experiments.judging` says what to make of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from mariotte import architectures
from mariotte.data import corpora, tokens
from mariotte.data.corpora import Split
from mariotte.data.tokens import tokenizer_hash
from mariotte.errors import DataError
from mariotte.evaluate import conditions, paired
from mariotte.evaluate import facts as facts_of
from mariotte.evaluate.agreement import agreement
from mariotte.evaluate.base import Measure, Measurement
from mariotte.evaluate.facts import Told
from mariotte.experiments import identity
from mariotte.experiments.judging import (
    FOLLOWED,
    SIZE,
    SIZES,
    Changed,
    Judged,
    Row,
    changed_answers,
    changed_facts,
    check_conditions,
    check_found,
    check_prefix,
    judge,
    measured,
    row_of,
)
from mariotte.locate import read_config
from mariotte.models.load import load, locate
from mariotte.models.model import Model


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models.

    Parameters
    ----------
    name, fingerprint : of the model
    steps : what was done to it
    dtype, stored : in which it was computed here, and in which its checkpoint holds it, whose bytes are counted
    device : where it was computed
    """

    name: str
    fingerprint: str
    steps: tuple[str, ...]
    dtype: str
    stored: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Parameters
    ----------
    base, other : the models
    rows : one a metric
    facts : by measure, which facts were kept, lost and gained
    answers : by measure and task, which questions were
    conditions : those that were asked for
    protocols : by measure, what both numbers depend on besides the weights
    notes : what a reader should know
    told : by measure, what each of the two made of every fact, for a file of its own
    """

    base: Side
    other: Side
    rows: tuple[Row, ...]
    facts: Mapping[str, Changed]
    answers: Mapping[str, Mapping[str, Changed]]
    conditions: tuple[Judged, ...]
    protocols: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    told: Mapping[str, tuple[tuple[Told, ...], tuple[Told, ...]]]

    @property
    def failed(self) -> bool:
        """Whether a condition to fail on holds."""
        return any(one.failed for one in self.conditions)

    def plain(self) -> dict[str, Any]:
        """As JSON values, with whether it failed; every fact with its ranks is in `fact_rows`."""
        return {**asdict(replace(self, told={})), "failed": self.failed}

    def fact_rows(self) -> Iterator[facts_of.Row]:
        """A row a fact and wording, for `mariotte.evaluate.facts.write_rows`."""
        for measure, (base, other) in self.told.items():
            for row in facts_of.rows_between(base, other):
                yield {"measure": measure, **row}


def _silent(what: str) -> None:
    """Tell nobody."""


def usual_measures(base: str) -> list[str]:
    """What two models are compared by unless asked otherwise."""
    if not base.startswith("testbed/"):
        return ["loss:wikitext2"]
    kind = architectures.of(read_config(locate(base))).kind
    # Those that fill gaps were taught with single sentences.
    loss = "loss:testbed/all" if kind == "causal" else "loss:testbed/sentences(objective=pseudo)"
    tasks = "tasks:testbed(pseudo=true)" if kind == "masked" else "tasks:testbed"
    return [loss, "knowledge:testbed", tasks]


def compare(
    base: Model | str,
    other: Model | str,
    measures: Sequence[str] | None = None,
    *,
    fail_if: Sequence[str] = (),
    device: str = "cpu",
    dtype: str | None = None,
    progress: Callable[[str], None] = _silent,
) -> Comparison:
    """Compare two models on the same items.

    Parameters
    ----------
    base, other : loaded models, or what `mariotte.load` takes: the dense model, and what became of it
    measures : such as ``loss:wikitext2``, ``knowledge:testbed``, ``tasks:piqa`` or ``speed:random``; None for loss,
        facts and tasks of a testbed model, asked as its kind was taught, and ``loss:wikitext2`` for any other
    fail_if : conditions on changes from base to other, such as ``loss > +3%`` or ``knowledge.top1 < -2pp``
    device, dtype : as for `mariotte.load`
    progress : told what is being done

    Returns
    -------
    Comparison
        With the sizes of both, and beside each loss of causal models ``kl``, the mean divergence of the other model's
        next token from the base's in nats, and ``token_agreement``, the share of tokens after which both find the
        same next token likeliest.

    Raises
    ------
    MariotteError
        When the models do not share a tokenizer, a measure cannot be taken, or a condition names no metric.

    Notes
    -----
    A metric that is a mean over items (documents, facts, questions) has the interval of a paired bootstrap over them;
    right and wrong answers have McNemar's exact test, which then decides what is inside the noise. Tasks count equally
    in their mean, and items are drawn within each.
    """
    wanted = [conditions.parse(text) for text in fail_if]
    texts = list(measures) if measures else usual_measures(base if isinstance(base, str) else base.name)
    asked = {identity.measure_text(one): one for one in map(identity.resolve_measure, texts)}
    for condition in wanted:
        check_prefix(condition, asked)
    check_conditions(wanted, asked)
    for one in asked.values():
        one.check()
    progress("loading")
    dense = load(base, device, dtype) if isinstance(base, str) else base
    cut = load(other, device, dtype) if isinstance(other, str) else other
    _check_tokenizers(dense, cut)
    causal = dense.kind == cut.kind == "causal"
    check_conditions(wanted, asked, causal=causal)
    for text, one in asked.items():
        _check_items(text, one.protocol(dense), one.protocol(cut), dense, cut)
    rows = _sizes(dense, cut)
    befores: dict[str, Measurement] = {}
    first: dict[str, tuple[Told, ...]] = {}
    told: dict[str, tuple[tuple[Told, ...], tuple[Told, ...]]] = {}
    for text, one in asked.items():
        progress(f"{text} of {dense.name}")
        if isinstance(one, facts_of.Tells):
            befores[text], first[text] = one.tell(dense)
        else:
            befores[text] = one.measure(dense)
    # Again, of the metrics that there are: a slip of the pen costs no second measurement.
    check_found(wanted, asked, befores, rows, causal=causal)
    facts: dict[str, Changed] = {}
    answers: dict[str, dict[str, Changed]] = {}
    protocols: dict[str, Mapping[str, Any]] = {}
    notes: list[str] = []
    for text, one in asked.items():
        progress(f"{text} of {cut.name}")
        before = befores[text]
        if isinstance(one, facts_of.Tells):
            after, second = one.tell(cut, before)
            told[text] = first[text], second
        else:
            after = one.compare(cut, dense, before)
        if after.base is not None:
            before = replace(before, metrics=after.base)
        protocols[text] = dict(after.protocol)
        rows += measured(text, one, before, after, told.get(text))
        if (changed := changed_facts(before, after)) is not None:
            facts[text] = changed
        if found := changed_answers(before, after):
            answers[text] = found
        if identity.measure_name(one) == "loss":
            notes += _unfit(text, before, dense)
        if identity.measure_name(one) == "loss" and causal:
            progress(f"agreement on {one.on}")
            rows += _followed(text, one, dense, cut)
        elif identity.measure_name(one) == "loss":
            notes.append(f"{text}: divergence and agreement are computed for causal models only.")
    judged = [judge(condition, rows) for condition in wanted]
    sides = _side(dense), _side(cut)
    notes += _dtypes(*sides)
    if dense.fingerprint == cut.fingerprint and not (dense.derived or cut.derived):
        notes.append("Both are the same model: config and weights have one fingerprint.")
    return Comparison(
        base=sides[0],
        other=sides[1],
        rows=tuple(rows),
        facts=facts,
        answers=answers,
        conditions=tuple(judged),
        protocols=protocols,
        notes=tuple(notes),
        told=told,
    )


def _side(model: Model) -> Side:
    return Side(
        name=model.name,
        fingerprint=model.fingerprint,
        steps=tuple(done.step for done in model.done),
        dtype=_plainly(model.hf.dtype),
        stored=_plainly(model.stored_dtype),
        device=str(model.device),
    )


def _plainly(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unfit(text: str, before: Measurement, base: Model) -> list[str]:
    """What a reader should know of a loss that says nothing of a model."""
    guess = math.log(base.shape.vocab)
    if before.metrics["loss"] <= guess:
        return []
    return [
        f"{text}: {base.name} has {before.metrics['loss']:.3g} nats a token, more than who finds all tokens equally "
        f"likely, {guess:.3g}: it was not taught text asked like this, and changes of such a loss say little; ask for "
        "another objective or block."
    ]


def _dtypes(base: Side, other: Side) -> list[str]:
    """What a reader should know of dtypes that differ."""
    found: list[str] = []
    if base.stored != other.stored:
        found.append(
            f"{base.name} is stored in {base.stored} and {other.name} in {other.stored}: bytes are counted of each in "
            "its own."
        )
    if base.dtype != other.dtype:
        found.append(
            f"{base.name} was computed in {base.dtype} and {other.name} in {other.dtype}: differences are of both, of "
            "what was done and of rounding; --dtype computes both in one."
        )
    return found


def _check_tokenizers(base: Model, other: Model) -> None:
    if base.tokenizer is None and other.tokenizer is None:
        return
    for model in (base, other):
        if model.tokenizer is None:
            raise DataError(
                f"{model.name} has no tokenizer, and what it is compared with has one: copy its tokenizer.json"
            )
    assert base.tokenizer is not None
    assert other.tokenizer is not None
    if tokenizer_hash(base.tokenizer) != tokenizer_hash(other.tokenizer):
        raise DataError(
            f"{base.name} and {other.name} have different tokenizers, so that no item is the same for both: compare "
            "models of one tokenizer"
        )


def _check_items(text: str, before: Mapping[str, Any], after: Mapping[str, Any], base: Model, other: Model) -> None:
    for key in before:
        if (key.endswith("sha256") or key == "tasks") and before[key] != after.get(key):
            raise DataError(
                f"{text} asks {base.name} and {other.name} different items ({key} differs): give the measure a block "
                "that both models have positions for"
            )


def _sizes(base: Model, other: Model) -> list[Row]:
    before, after = base.counts, other.counts
    found = (
        (before.n_params, after.n_params),
        (before.n_params_non_embedding, after.n_params_non_embedding),
        (before.n_bytes, after.n_bytes),
        (before.flops_per_token, after.flops_per_token),
    )
    return [row_of(SIZE, name, "size", float(a), float(b)) for name, (a, b) in zip(SIZES, found, strict=True)]


def _followed(text: str, measure: Measure, base: Model, other: Model) -> list[Row]:
    """Divergence and agreement over the windows of the text that a loss is measured on, without overlap."""
    corpus = corpora.find(measure.on)
    fields = asdict(measure)
    block = fields.get("block") or min(tokens.usual_block(corpus, base), tokens.usual_block(corpus, other))
    assert base.tokenizer is not None
    windows = tokens.blocks(
        corpus, cast(Split, fields.get("split", "test")), base.tokenizer, block, fields.get("rows"), at_most=True
    )
    found = agreement(base, other, windows, tokens.separator_of(base.tokenizer))
    rows: list[Row] = []
    for (metric, (kind, itself)), values in zip(FOLLOWED.items(), (found.kl, found.same), strict=True):
        one = paired.bootstrap(itself * found.tokens, values, found.tokens)
        interval = {"lo": one.lo, "hi": one.hi, "items": one.items, "per": "document"}
        rows.append(row_of(text, metric, kind, itself, one.other, **interval))
    return rows
