"""Seconds of a step and of a prompt from a machine's numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mariotte.chain import parse
from mariotte.locate import config_of
from mariotte.plan.speed import Calibration, decode_seconds, prompt_seconds
from mariotte.shapes import Sized, left_by

NOTHING = Calibration(
    machine="here",
    device="cpu",
    dtype="float32",
    threads=1,
    flops_per_s=1e30,
    bytes_per_s=1e30,
    operation_s=1e-6,
    measured="2026-01-01",
)
MODEL = Sized.of("testbed/qwen2-1m", config_of("testbed/qwen2-1m"))


def left(chain: str):  # type: ignore[no-untyped-def]
    found = left_by(MODEL, parse(chain))
    assert found is not None
    return found


def test_where_nothing_is_computed_calls_are_all() -> None:
    layers = MODEL.shape.layers
    known = replace(NOTHING, block_s=2e-4, step_s=1e-4)
    assert decode_seconds(MODEL, left("dense"), 16, 1, known) == pytest.approx(layers * 2e-4 + 1e-4)
    assert prompt_seconds(MODEL.shape, 16, known) == pytest.approx(layers * 2e-4 + 1e-4)
    earlier = decode_seconds(MODEL, left("dense"), 16, 1, NOTHING)
    assert earlier == pytest.approx(layers * 70 * 1e-6)


def test_reading_weights_counts_them_in_the_machines_dtype() -> None:
    slow = replace(NOTHING, bytes_per_s=1e6, block_s=1e-12, step_s=1e-12)
    dense, cut = (decode_seconds(MODEL, left(chain), 0, 1, slow) for chain in ("dense", "ffn@0.5"))
    saved = left("dense").n_params - left("ffn@0.5").n_params
    assert dense - cut == pytest.approx(4 * saved / 1e6)


def test_a_prompt_takes_its_arithmetic() -> None:
    slow = replace(NOTHING, flops_per_s=1e9, block_s=1e-12, step_s=1e-12)
    short, long = (prompt_seconds(MODEL.shape, tokens, slow) for tokens in (64, 128))
    assert 2 * short < long < 2.2 * short  # attention grows with the square
