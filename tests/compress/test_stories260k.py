"""A real model: what methods may cost stories260K, by the protocol of benchmarks/stories260k.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.slice import Slice
from mariotte.compress.methods.slicegpt import SliceGPT
from mariotte.compress.surgery import derive
from mariotte.models.load import load
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Step, prepare_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real(shared: Path):
    data = shared / "data"
    model = load(data / "models" / "stories260K")
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    return model, rows[:128], rows[-200:]


# The losses of the first trials of these methods, at the same cuts of the same model on the same text.
@pytest.mark.parametrize(
    ("step", "amount", "parameters", "at_most"),
    [
        (Slice(), 0.25, 219_600, 3.28),
        (Slice(), 0.5, 146_400, 4.77),
        (FFN(), 68 / 172, 194_752, 2.754),
        (FFN(sequential=True), 68 / 172, 194_752, 2.694),
        (FFN(criterion="activation"), 68 / 172, 194_752, 2.773),
    ],
    ids=str,
)
def test_a_real_model_loses_no_more_than_the_first_trials(real, step: Step, amount, parameters, at_most, tmp_path):
    model, calibration, test = real
    context = Context(dense=model, scratch=tmp_path, calibration=calibration)
    cut = step.apply(model, prepare_once(step, model, context, [amount]), amount, context)
    assert cut.counts.n_params == cut.measured_params() == parameters
    dense, loss = (float(token_nll(m, test, batch=8).mean()) for m in (model, cut))
    assert dense == pytest.approx(1.766, abs=0.002)
    assert dense < loss < at_most


# What microsoft/TransformerCompression made of it, on the same text. It takes the mean out of every embedding.
@pytest.mark.parametrize(
    ("amount", "parameters", "published"),
    [(0.125, 292_864, 2.348), (0.25, 253_824, 3.130), (0.375, 215_936, 3.914), (0.5, 179_200, 4.476)],
)
def test_slicegpt_loses_what_the_published_code_loses(real, amount, parameters, published, tmp_path):
    model, calibration, test = real
    embedded = model.embeddings.weight.detach()
    weights = {
        "model.embed_tokens.weight": embedded - embedded.mean(-1, keepdim=True),
        "lm_head.weight": model.head.weight,
    }
    centred = derive(model, weights, untie=True)
    context = Context(dense=centred, scratch=tmp_path, calibration=calibration)
    step = SliceGPT()
    cut = step.apply(centred, prepare_once(step, centred, context, [amount]), amount, context)
    assert cut.counts.n_params == cut.measured_params() == parameters
    assert float(token_nll(cut, test, batch=8).mean()) == pytest.approx(published, rel=0.005)
