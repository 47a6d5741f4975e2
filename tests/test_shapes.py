"""Shapes tell what records measured, and what methods leave of models of every family that they claim."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from mariotte import architectures, shapes
from mariotte.chain import Chain, parse
from mariotte.cuts import common, matrices
from mariotte.errors import ModelError
from mariotte.evaluate.measures.memory import kv_bytes
from mariotte.experiments.identity import resolve
from mariotte.experiments.pipeline import compress_model
from mariotte.locate import config_of
from mariotte.models import irregular
from mariotte.models.model import Model
from mariotte.models.step import Step, prepare_once
from mariotte.plan.pool import shipped
from mariotte.shapes import Left, Sized, cache_bytes_per_token, foretold, left_by, memory_bytes
from mariotte.testing.methods import all_steps, amounts, context_of
from mariotte.testing.tiny import tiny


def test_every_shipped_record_is_foreseen_to_the_parameter() -> None:
    models = {name: Sized.of(name, config_of(name)) for name in {entry.model for entry in shipped()}}
    chains = {(e.model, e.chain): e for e in shipped()}
    seen = 0
    for (model, chain), entry in chains.items():
        left = left_by(models[model], parse(chain))
        assert left is not None, chain
        assert left.n_params == entry.n_params, (model, chain)
        seen += 1
        if left.bits is not None:
            assert left.n_bytes == entry.n_bytes, (model, chain)
    assert seen > 1000


@pytest.mark.parametrize("method", ["ffn", "slice", "slicegpt", "shortgpt", "prunenet-random"])
def test_what_is_obtained_is_what_records_obtained(method: str) -> None:
    for entry in shipped():
        if entry.chain.startswith(f"{method}@") and "|" not in entry.chain:
            left = left_by(Sized.of(entry.model, config_of(entry.model)), parse(entry.chain))
            assert left is not None
            assert left.obtained == pytest.approx(entry.obtained, abs=1e-6)


@pytest.mark.parametrize("chain", ["sleb@0.5", "laco@0.4", "gptq@4", "ffn@0.3 | gptq@3(symmetric=true)"])
def test_what_no_shipped_record_has_is_foreseen_too(chain: str) -> None:
    model = Sized.of("testbed/qwen2-113k", config_of("testbed/qwen2-113k"))
    made = compress_model(model.name, chain, calibration="testbed/all", rows=4)
    left = left_by(model, parse(chain))
    assert left is not None
    assert left.n_params == made.counts.n_params
    if left.bits is not None:
        assert left.n_bytes == made.counts.n_bytes


def test_steps_that_shapes_do_not_tell_of_are_unknown() -> None:
    model = Sized.of("testbed/qwen2-1m", config_of("testbed/qwen2-1m"))
    for chain, why in (
        ("ffn@0.5(of=model)", "counts its amount in parameters of the dense model"),
        ("auto@0.5", "is a step of which sizes alone tell nothing"),
        ("flap@0.3 | svd-llm@0.3", "needs sizes that are known, and text decides which groups flap removes"),
        ("modegpt@0.3 | rtn@4(group=64)", "text decides how the blocks share what modegpt removes"),
        ("int8 | lora@1k", "trains weights, and int8 rounds them before"),
        ("int8 | fp8", "needs weights that were not quantized yet, and int8 was done to them"),
        ("magnitude@0.5 | int4(group=32)", "needs weights that were not set to zero"),
    ):
        assert left_by(model, parse(chain)) is None
        with pytest.raises(ModelError, match=why):
            foretold(model, parse(chain))


def test_memory_grows_with_context_by_what_the_cache_takes() -> None:
    model = Sized.of("testbed/qwen2-1m", config_of("testbed/qwen2-1m"))
    left = left_by(model, parse("ffn@0.5"))
    assert left is not None
    assert cache_bytes_per_token(left.shape, 2) == kv_bytes(left.shape, 2)
    longer = memory_bytes(model, left, 6144, 2) - memory_bytes(model, left, 4096, 2)
    assert longer == 2 * 2048 * kv_bytes(left.shape, 2)


TOLD = [step for step in all_steps() if step.name() in (*shapes.CUTS, *shapes.ZEROES, *shapes.QUANTIZERS)]
"""Every method of the catalogue, in every scope that it has."""

VARIANTS = (
    "flap@0.5(uniform=true)",
    "flap@0.5(compensate=false)",
    "flap@0.5:ffn(uniform=true)",
    "heads@0.5(by=groups)",
    "heads@0.5(by=queries)",
    "llm-pruner@0.5(first=1, last=0)",
    "llm-pruner@0.5:ffn(first=0, last=1)",
    "modegpt@0.5(allocation=uniform)",
    "modegpt@0.5:ffn(allocation=uniform)",
    "modegpt@0.5(allocation=uniform, queries=0)",
    "sleb@0.9(first=1)",
    "rtn@3(group=4)",
    "rtn@4(symmetric=true)",
    "int8-dynamic(scheme=torch)",
)


def variant(text: str) -> Step:
    return resolve(parse(text))[0].step


def fitting(step: Step) -> Step:
    """With groups that divide the widths of the models here."""
    return replace(step, group=32) if step.name() == "int4" else step  # pyright: ignore[reportCallIssue]


STEPS = [*map(fitting, TOLD), *map(variant, VARIANTS)]


@cache
def model_of(family: str, *, tied: bool, ffn: int = 40) -> Model:
    return tiny(family, tied=tied, hidden=32, heads=4, kv_heads=2, ffn=ffn, layers=3)


def tried(step: Step, family: str) -> Model:
    """A model on which a step can be tried: with a width that few multiples divide, unless it insists on one."""
    return model_of(family, tied=family != "llama", ffn=64 if step.name() == "int4" else 40)


def chain_of(step: Step, amount: int | float) -> Chain:
    return Chain((step.link(amount),))


def sized(model: Model) -> Sized:
    return Sized.of(model.name, model.config | {"dtype": "float32"})


def test_every_method_that_removes_or_rounds_is_foretold() -> None:
    assert {step.name() for step in TOLD} == {step.name() for step in all_steps()}
    for step in TOLD:
        told = shapes._METHODS.get(step.name()) or shapes._QUANTIZERS[step.name()]  # pyright: ignore[reportPrivateUsage]
        assert (set(told.needs), told.mixtures) == (set(step.needs), step.mixtures), step.name()
        assert told.scopes == step.scopes, step.name()
        if isinstance(told, shapes._Method):  # pyright: ignore[reportPrivateUsage]
            assert told.narrows == (step.family in ("width", "slice")), step.name()
    assert tuple(irregular.CLASSES) == common.IRREGULAR


@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step.link(0.5)))
def test_what_goes_is_what_the_method_says_on_every_family_that_it_claims(step: Step) -> None:
    """The method's own word, which its conformance suite compares with parameters that are held."""
    claimed = 0
    for family in architectures.FAMILIES:
        model = tried(step, family)
        reason = step.refuse(model)
        for amount in (0.0, 0.125, 0.4, 1 - 1e-9) if step.unit != "bits" else amounts(step):
            if reason is not None and "own linear layers" in reason:
                continue  # of which sizes tell nothing
            if reason is not None:
                with pytest.raises(ModelError) as raised:
                    foretold(sized(model), chain_of(step, amount))
                assert reason in str(raised.value) or "group" in reason, family
                continue
            left = foretold(sized(model), chain_of(step, amount))
            claimed += 1
            if step.unit != "bits":
                gone = model.counts.n_params - left.n_params + left.zeros
                rows = sum(outputs for outputs, _ in matrices.matrices_of(sized(model), "all"))
                slack = step.slack(model) + (2 * rows if left.zeros else 0)  # rounded row by row
                assert abs(step.removes(model, amount) - gone) <= slack, (family, amount)
    assert claimed


def agrees(left: Left, made: Model, bytes_off: int = 0) -> None:
    """What is foretold is what is there."""
    assert abs(left.n_params - made.counts.n_params) <= left.slack
    assert made.measured_params() == made.counts.n_params
    if not left.decided:
        assert left.shape == made.shape
        assert left.n_params == made.counts.n_params
        assert abs(left.n_bytes - made.counts.n_bytes) <= bytes_off
        assert left.flops_per_token == made.counts.flops_per_token
        assert cache_bytes_per_token(left.shape, 4) == kv_bytes(made.shape, 4)
    elif not left.slack:
        assert left.n_params == made.counts.n_params
        assert left.flops_per_token == made.counts.flops_per_token
        assert cache_bytes_per_token(left.shape, 4) == kv_bytes(made.shape, 4)
    else:
        assert left.most is not None
        assert cache_bytes_per_token(left.most, 4) >= kv_bytes(made.shape, 4)
        assert max(map(left.most.ffn_of, range(3))) >= max(map(made.shape.ffn_of, range(3)))
        # What blocks alike would have is as near.
        alike = shapes.accounting.count_shape(left.shape)
        assert abs(alike.n_params - left.n_params) <= left.slack
        off = abs(left.flops_per_token - made.counts.flops_per_token)
        assert off <= 4 * left.slack


NEW = ("heads", "flap", "llm-pruner", "modegpt", "svd-llm", "experts", "expert-ffn", "fp8")


def really(step: Step, families: list[str], folder: Path) -> int:
    """How many of these families a method was made on, at several amounts, as foretold."""
    made = 0
    for family in families:
        model = tried(step, family)
        if step.refuse(model) is not None:
            continue
        context = context_of(model, folder / family)
        several = amounts(step) if step.unit == "bits" else (0.25, 0.5, 0.9)
        prepared = prepare_once(step, model, context, several)
        for amount in several:
            cut = step.apply(model, prepared, amount, context)
            left = foretold(sized(model), chain_of(step, amount))
            agrees(left, cut)
            if left.shares:
                done = cut.done[-1].obtained
                # Of weights that become zero the share that is asked for is told, and not how it is rounded by row.
                allowed = 0.3 if left.slack else 0.03 if left.zeros else 1e-9
                assert left.obtained == pytest.approx(done, abs=allowed), (family, amount)
        made += 1
    return made


FEW = ["llama", "gpt2", "qwen3", "mixtral"]
"""Whole and fused matrices, held one way round and the other, norms of heads, experts."""


@pytest.mark.parametrize("step", [s for s in STEPS if s.name() in NEW], ids=lambda step: str(step.link(0.5)))
def test_what_is_foretold_is_what_is_made(step: Step, tmp_path: Path) -> None:
    assert really(step, FEW, tmp_path)


CHAINS = (
    "shortgpt@0.34 | heads@0.5 | ffn@0.3 | slice@0.25 | int8",
    "slicegpt@0.25 | rtn@4",
    "heads@0.5 | svd-llm@0.4 | rtn@4(group=2)",
    "svd-llm@0.4 | shortgpt@0.34 | fp8",
    "modegpt@0.3(allocation=uniform) | svd-llm@0.2 | int8:attention | rtn@3:ffn",
    "llm-pruner@0.5(first=1) | rtn@8:attention(group=8)",
    "heads@0.5 | flap@0.3 | magnitude@0.5 | int8",
    "ffn@0.3 | modegpt@0.3 | int8",
    "int8 | magnitude@0.5",
    "gpt_neox: slicegpt@0.25 | heads@0.5 | int8",
    "falcon: ffn@0.3 | svd-llm@0.4 | rtn@4",
    "phi3: shortgpt@0.34 | modegpt@0.3:ffn(allocation=uniform) | svd-llm@0.3 | rtn@3",
    "mixtral: experts@0.5 | expert-ffn@0.4 | heads@0.5 | int8",
)


@pytest.mark.parametrize("text", CHAINS)
def test_what_chains_leave_is_foretold(text: str, tmp_path: Path) -> None:
    family, _, text = text.rpartition(": ")
    model = model_of(family or "llama", tied=True)
    made, parts = model, resolve(parse(text))
    for place, part in enumerate(parts):
        context = context_of(made, tmp_path / str(place))
        assert part.step.refuse(made) is None
        made = part.step.apply(made, prepare_once(part.step, made, context, [part.amount]), part.amount, context)
    left = foretold(sized(model), parse(text))
    agrees(left, made)
    if not left.slack:
        assert left.n_bytes == made.counts.n_bytes
    shares = [done.obtained for done in made.done if done.family not in ("quantization", "unstructured")]
    assert left.shares[: len(shares)] == pytest.approx(shares, abs=0.2 if left.slack else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step.link(0.5)))
def test_what_is_foretold_is_what_is_made_of_every_family(step: Step, tmp_path: Path) -> None:
    assert really(step, [f for f in architectures.FAMILIES if f not in FEW], tmp_path)
