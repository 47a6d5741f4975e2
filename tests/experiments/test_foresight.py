"""What the first steps of a chain leave is known before any work, and chains that cannot end are refused then."""

from __future__ import annotations

from pathlib import Path

import pytest

from mariotte import architectures
from mariotte import chain as chains
from mariotte.compress.scope import in_scope, oriented
from mariotte.cuts.matrices import input_widths
from mariotte.errors import ChainError, MariotteError, ModelError
from mariotte.experiments import foresight, identity
from mariotte.experiments.pipeline import Task, compress_model, perform
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Counters
from mariotte.shapes import Sized, foretold
from mariotte.testing.tiny import tiny


def parts_of(text: str) -> tuple[identity.Part, ...]:
    return identity.resolve(chains.parse(text))


CHAINS = (
    "shortgpt@0.34 | heads@0.2",
    "slice@0.3 | heads@0.4 | ffn@0.3",
    "prunenet-random@0.4 | magnitude@0.3 | slice@0.25",
    "heads@0.4(by=groups) | slice@0.2 | shortgpt@0.5",
)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["testbed/llama-146k", "testbed/qwen2-46k"])
def test_the_sizes_that_are_foreseen_are_those_that_come(name: str, chain: str) -> None:
    model = load(name)
    shape = foretold(Sized.of(name, model.config), chains.parse(chain)).shape
    cut = compress_model(model, chain, calibration="testbed/all", rows=4)
    assert shape == cut.shape
    for scope in ("all", "attention", "ffn", "head"):
        real = {oriented(matrix).shape[1] for matrix in in_scope(cut, scope).values()}
        assert real == set(input_widths(shape, scope).values())


@pytest.mark.parametrize("family", sorted(architectures.FAMILIES))
def test_the_widths_that_groups_must_divide_are_those_of_the_matrices(family: str) -> None:
    model = tiny(family, tied=True)
    for scope in ("attention", "ffn", "head"):
        real = {oriented(matrix).shape[1] for matrix in in_scope(model, scope).values()}
        assert real == set(input_widths(model.shape, scope).values())


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any preparation fails, so that what is refused was refused before."""

    def fail(*_: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("mariotte.experiments.bench.prepare_once", fail)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (
            "rtn@4(group=64)",
            "rtn cannot work on testbed/llama-146k: needs input widths that group=64 divides, and the hidden size has "
            "48: take a group that divides them all (16, 8, 4, 2), or leave group out",
        ),
        (
            "experts@0.5 | rtn@4",
            "experts cannot work on testbed/llama-146k: needs a mixture of experts, and llama has one MLP a block: "
            "take ffn",
        ),
        (
            "ffn@0.2 | rtn@4(group=16)",
            "rtn cannot work on what ffn@0.2 leaves of testbed/llama-146k: it needs input widths that group=16 "
            "divides, and the MLP has 104: take a group that divides them all (8, 4, 2), or leave group out",
        ),
        (
            "slice@0.2 | shortgpt@0.34 | gptq@4:attention(group=16)",
            "gptq cannot work on what slice@0.2 | shortgpt@0.34 leaves of testbed/llama-146k: it needs input widths "
            "that group=16 divides, and the hidden size has 36: take a group that divides them all (12, 6, 4, 3, 2), "
            "or leave group out",
        ),
        (
            "heads@0.25 | rtn@4:attention(group=32)",
            "rtn cannot work on what heads@0.25 leaves of testbed/llama-146k: it needs input widths that group=32 "
            "divides, and the hidden size has 48: take a group that divides them all (16, 8, 4, 2), or leave group out",
        ),
        (
            "svd-llm@0.3 | gptq@4(group=16)",
            "gptq cannot work on what svd-llm@0.3 leaves of testbed/llama-146k: it needs input widths that group=16 "
            "divides, and a factor of 24 has 24: take a group that divides them all (8, 4, 2), or leave group out",
        ),
        (
            "modegpt@0.3(allocation=uniform) | rtn@4(group=16)",
            "rtn cannot work on what modegpt@0.3(allocation=uniform) leaves of testbed/llama-146k: it needs input "
            "widths that group=16 divides, and the attention output has 30: take a group that divides them all (2), or "
            "leave group out",
        ),
        (
            "svd-llm@0.3 | ffn@0.2",
            "ffn cannot work on what svd-llm@0.3 leaves of testbed/llama-146k: it needs whole matrices, and this model "
            "holds some as products of two: do it before svd-llm",
        ),
        (
            "ffn@0.2 | int8 | rtn@4",
            "rtn cannot work on what ffn@0.2 | int8 leaves of testbed/llama-146k: it needs weights that were not "
            "quantized yet, and int8 was done to them: quantize once, from the model before it",
        ),
        (
            "modegpt@0.3 | int8 | heads@0.5",
            "heads cannot work on what modegpt@0.3 | int8 leaves of testbed/llama-146k: it needs heads whose queries "
            "and values are as wide as the config says, and these are not: do it before",
        ),
    ],
)
def test_steps_are_checked_against_sizes_as_they_are_and_will_be(chain: str, said: str) -> None:
    with pytest.raises(ModelError) as raised:
        compress_model("testbed/llama-146k", chain, calibration="testbed/all", rows=4)
    assert str(raised.value) == said


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("recovery", ["lora@1k", "full@1k", "distill@1k", "block@1k", "lora@auto(gain=1%)"])
@pytest.mark.parametrize("quantizer", ["int8", "rtn@4", "gptq@3", "int8-dynamic", "fp8"])
def test_nothing_is_trained_after_a_quantization(quantizer: str, recovery: str) -> None:
    name = recovery.partition("@")[0]
    with pytest.raises(ChainError) as raised:
        compress_model("testbed/qwen2-46k", f"ffn@0.3 | {quantizer} | {recovery}", calibration="testbed/all", rows=4)
    assert str(raised.value) == (
        f"{name} trains weights, and {quantizer} rounds them before: put {name} before the quantization"
    )


def test_a_model_that_was_quantized_when_it_was_loaded_is_not_trained() -> None:
    quantized: Model = compress_model("testbed/qwen2-46k", "int8")
    with pytest.raises(ChainError, match=r"^lora trains weights, and int8 rounds them before: put lora before"):
        compress_model(quantized, "lora@1k", calibration="testbed/all", rows=4)


@pytest.mark.parametrize("chain", ["auto@0.2 | rtn@4(group=24)", "ffn@0.2(of=model) | rtn@4(group=24)"])
def test_what_sizes_do_not_tell_is_left_to_the_step(chain: str) -> None:
    model = load("testbed/qwen2-46k")
    try:
        foresight.check(model.name, model.config, parts_of(chain))
    except MariotteError as error:
        raise AssertionError("only the search, or the preparation, knows the width") from error


def test_of_a_study_only_the_chain_that_cannot_end_fails_and_nothing_is_done_for_it(tmp_path: Path) -> None:
    doomed, fine = "ffn@0.2 | rtn@4(group=24)", "rtn@4"
    task = Task(
        study="s",
        model="testbed/qwen2-46k",
        chains=(doomed, fine),
        measures={"loss:testbed/news(rows=4)": "all"},
        seeds=(0,),
        calibration=None,
        work=tmp_path,
    )
    counters = Counters()
    failed = {outcome.chain: outcome.failure for outcome in perform(task, counters)}
    assert failed[fine] is None
    failure = failed[doomed]
    assert failure is not None
    assert failure.stage == "check"
    assert failure.error.startswith(
        "rtn cannot work on what ffn@0.2 leaves of testbed/qwen2-46k: it needs input widths"
    )
    assert (counters.preparations, counters.applications) == (1, 1)
