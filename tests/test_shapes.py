"""Shapes tell what records measured."""

from __future__ import annotations

import pytest

from mariotte.chain import parse
from mariotte.evaluate.measures.memory import kv_bytes
from mariotte.experiments.pipeline import compress_model
from mariotte.locate import config_of
from mariotte.plan.pool import shipped
from mariotte.shapes import Sized, cache_bytes_per_token, left_by, memory_bytes


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
    assert left_by(model, parse("heads@0.5")) is None
    assert left_by(model, parse("ffn@0.5(of=model)")) is None


def test_memory_grows_with_context_by_what_the_cache_takes() -> None:
    model = Sized.of("testbed/qwen2-1m", config_of("testbed/qwen2-1m"))
    left = left_by(model, parse("ffn@0.5"))
    assert left is not None
    assert cache_bytes_per_token(left.shape, 2) == kv_bytes(left.shape, 2)
    longer = memory_bytes(model, left, 6144, 2) - memory_bytes(model, left, 4096, 2)
    assert longer == 2 * 2048 * kv_bytes(left.shape, 2)
