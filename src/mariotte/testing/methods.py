"""What every compression method must do on every family it claims, as a test class.

Subclass it, say which steps on which families, and run pytest::

    @pytest.mark.parametrize(("step", "family"), cases([MyMethod(), MyMethod(ridge=0.1)]))
    class TestMyMethod(MethodConformance): ...
"""

# ruff: noqa: D102  (the name of a test is its docstring)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mariotte import architectures
from mariotte.compress import METHODS
from mariotte.compress.scope import oriented
from mariotte.errors import ChainError, DataError, MariotteError, ModelError
from mariotte.models import checkpoint
from mariotte.models.load import LOADED_BY, load, quiet_transformers
from mariotte.models.model import Done, Model, Stacked
from mariotte.models.step import Context, Prepared, Step, apply_at, prepare_once
from mariotte.testing.tiny import random_tokens, sizes_for, tiny, to_ask, weights_hash

SHARES = (0.125, 0.25, 0.5, 0.75, 0.9)
BITS = (8, 4)


def all_steps() -> list[Step]:
    """Every method of the catalogue with its default fields, and in every scope it has."""
    found = [cast("type[Step]", METHODS.find(name)) for name in METHODS.names()]
    return [step(scope=scope) for step in found for scope in step.scopes]


ODD: Mapping[str, Any] = {"hidden": 33, "heads": 3, "kv_heads": 1, "head_dim": 6, "ffn": 45}
"""Widths that no rounding divides."""

ODD_OF: Mapping[str, Mapping[str, Any]] = {
    "falcon": {"hidden": 30},  # whose heads are turned whole, so that their width is even
    "phi": {"head_dim": 8},  # of which half is turned
    # torch multiplies by the matrices of all experts at once, which have to begin at multiples of 16 bytes.
    **{family: {"hidden": 36, "ffn": 44} for family in ("mixtral", "qwen3_moe", "gpt_oss")},
}
"""The oddest that a family's own code can hold, where that is less."""

FAMILIES = ("llama", "qwen2")
"""On which everything is tried; see `MethodConformance`."""

OTHER_FAMILIES = tuple(family for family in architectures.FAMILIES if family not in FAMILIES)
"""On which every method that claims them is tried in short; see `FamilyConformance`."""


def cases(steps: Iterable[Step], families: Sequence[str] = FAMILIES, *, wide: bool = False) -> list[tuple[Step, str]]:
    """Each step with each of these families that it does not refuse.

    Parameters
    ----------
    wide : of the widths that its groups ask for, as `FamilyConformance` tries it
    """
    return [
        (step, family)
        for step in steps
        for family in families
        if step.refuse(to_ask(family, step if wide else None)) is None
    ]


def amounts(step: Step) -> tuple[int | float, ...]:
    """Amounts on which a step is tried, the mildest first."""
    if step.fixed is not None:
        return (step.fixed,)
    return BITS if step.unit == "bits" else SHARES


def middle(step: Step) -> int | float:
    """An amount that certainly changes a tiny model."""
    return amounts(step)[-1] if step.unit == "bits" else 0.5


def context_of(model: Model, scratch: Path, calibration: Tensor | None = None) -> Context:
    """A context with random calibration tokens unless others are given."""
    tokens = random_tokens(vocab=model.shape.vocab) if calibration is None else calibration
    return Context(dense=model, scratch=scratch, calibration=tokens)


def run(step: Step, model: Model, amount: int | float, scratch: Path, calibration: Tensor | None = None) -> Model:
    """Prepare and apply once."""
    context = context_of(model, scratch, calibration)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """Logits on fixed tokens, float32."""
    return model.logits(random_tokens(4, 16, vocab=model.shape.vocab, seed=1)).float()


def rounding_allowed(done: Done, model: Model) -> float:
    """How far the obtained amount may be from the asked one."""
    shape = model.shape
    if done.unit == "groups":
        return done.facts["rounding"]
    if done.unit == "weights":
        if done.family == "low-rank":
            return done.facts["rounding"] / sum(matrix.weight.numel() for matrix in model.matrices(done.scope))
        matrices = model.matrices(done.scope)
        if "rounding" in done.facts:
            return done.facts["rounding"] / max(done.in_scope, 1)
        rows, alone = (sum(len(oriented(matrix)) for matrix in matrices), sum(map(_alone, matrices)))
        once = rows if done.facts.get("per") == "row" else alone
        return once / max(done.in_scope, 1)  # at most one weight a row, or a matrix
    sizes = {"hidden": shape.hidden, "neurons": shape.ffn, "heads": shape.heads, "blocks": shape.layers}
    sizes["experts"] = shape.experts
    return done.facts.get("rounding", 1) / sizes[done.unit]


def _alone(matrix: nn.Linear | Stacked) -> int:
    """Matrices that one holds: of all experts, or itself."""
    return matrix.experts if isinstance(matrix, Stacked) else 1


@torch.no_grad()
def with_dead_parts(model: Model) -> Model:
    """The model with a dimension of the stream that is always zero and a neuron that never fires, in each block."""
    model.embeddings.weight[:, 3] = 0
    for block in model.blocks:
        *ins, down = block.ffn
        for linear in (block.output, down):
            _clear_output(linear, 3)
        _clear_output(ins[-1], 5)
    return model


def _clear_output(matrix: nn.Linear | Stacked, index: int) -> None:
    if isinstance(matrix, Stacked):  # of every expert
        (matrix.weight.transpose(1, 2) if matrix.transposed else matrix.weight)[:, index] = 0
    else:
        oriented(matrix)[index] = 0
    if matrix.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] some families have none
        matrix.bias[..., index] = 0


@torch.no_grad()
def overflowing(model: Model) -> Model:
    """The model with weights that are finite, float32, and activations that are not, from its first attention on."""
    for matrix in model.blocks[0].attention[-2:]:
        matrix.weight.mul_(1e30)
    return model


def complaint(work: Callable[[], object]) -> MariotteError | None:
    """What a user is told when something is tried, None when it works."""
    try:
        work()
    except MariotteError as error:
        return error
    return None


def reads_text(step: Step, model: Model, scratch: Path) -> bool:
    """Whether a step asks for calibration text when it prepares."""
    context = replace(context_of(model, scratch), calibration=None)
    error = complaint(lambda: step.prepare(model, context, amounts(step)))
    return is_a_sentence(error, step) if isinstance(error, DataError) else False


def is_a_sentence(error: MariotteError, step: Step) -> bool:
    """Whether an error is one line that names the step and ends in what to do; else it fails."""
    said = str(error)
    assert said.startswith(step.name()), said
    assert "\n" not in said
    assert ": " in said.removeprefix(f"{step.name()}: "), f"{said!r} does not say what to do"
    return True


class MethodConformance:
    """What every method promises; parametrise a subclass by ``step`` and ``family``."""

    def test_amount_zero_keeps_the_logits(self, step: Step, family: str, tmp_path: Path) -> None:
        if step.unit == "bits":
            pytest.skip("an amount of bits has no zero")
        model = tiny(family, tied=True)
        unchanged = run(step, model, 0.0, tmp_path)
        assert torch.equal(logits(unchanged), logits(model))
        assert unchanged.counts == model.counts
        assert unchanged.done[-1].obtained == 0

    def test_the_history_says_what_was_done(self, step: Step, family: str, tmp_path: Path) -> None:
        model = tiny(family)
        context = context_of(model, tmp_path)
        prepared = prepare_once(step, model, context, amounts(step))
        for amount in amounts(step):
            (done,) = step.apply(model, prepared, amount, context).done
            assert done.step == str(step.link(amount))
            assert (done.name, done.unit, done.family, done.amount) == (step.name(), step.unit, step.family, amount)
            assert done.obtained is not None
            if step.unit != "bits":
                assert abs(done.obtained - amount) <= rounding_allowed(done, model) + 1e-9
            assert (done.in_scope > 0) == (step.family == "unstructured")
            assert done.zeros <= done.in_scope

    def test_measured_size_equals_accounting_and_never_grows(self, step: Step, family: str, tmp_path: Path) -> None:
        for tied in (False, True):
            model = tiny(family, tied=tied)
            context = context_of(model, tmp_path / str(tied))
            prepared = prepare_once(step, model, context, amounts(step))
            # A head that has to be untied costs a vocabulary matrix at the first cut, whatever the amount.
            sizes: list[float] = [math.inf if tied else model.measured_params()]
            for amount in amounts(step):
                cut = step.apply(model, prepared, amount, context)
                assert cut.measured_params() == cut.counts.n_params
                sizes.append(cut.measured_params())
            assert sizes == sorted(sizes, reverse=True)
            if step.unit not in ("weights", "bits") or step.family == "low-rank":
                assert sizes[-1] < sizes[1], "a cut of most of a width removes nothing"

    def test_what_it_says_it_removes_is_what_it_removes(self, step: Step, family: str, tmp_path: Path) -> None:
        if type(step).removes is Step.removes:
            with pytest.raises(ChainError, match="removes no parameters"):
                replace(step, of="model")
            return
        model = tiny(family)
        context = context_of(model, tmp_path)
        of_model = replace(step, of="model")
        prepared = prepare_once(step, model, context, amounts(step))
        for amount in (0.0, *amounts(step)):
            cut = step.apply(model, prepared, amount, context)
            removed = model.measured_params() - cut.measured_params() + cut.done[-1].zeros
            assert abs(step.removes(model, amount) - removed) <= step.slack(model)
            share = removed / model.measured_params()
            if share > 0:
                same = apply_at(of_model, model, prepared, share, context)
                assert abs(same.measured_params() - cut.measured_params()) <= 2 * step.slack(model)
                slack = 2 * step.slack(model) / model.measured_params()
                assert same.done[-1].obtained == pytest.approx(share, rel=1e-6, abs=slack)
                assert same.done[-1].unit == "parameters"
        with pytest.raises(ChainError, match="can remove at most"):
            apply_at(of_model, model, prepared, 0.999, context)

    def test_every_amount_comes_from_one_finished_preparation(self, step: Step, family: str, tmp_path: Path) -> None:
        model = tiny(family)
        context = context_of(model, tmp_path)
        prepare_once(step, model, context, amounts(step))
        assert Prepared.open(tmp_path) is not None
        again = prepare_once(step, model, context, amounts(step))
        assert context.counters.preparations == 1
        cut = step.apply(model, again, middle(step), context)
        assert weights_hash(cut) == weights_hash(run(step, model, middle(step), tmp_path / "alone"))

    def test_same_seed_same_bits(self, step: Step, family: str, tmp_path: Path) -> None:
        first, second = (run(step, tiny(family), middle(step), tmp_path / part) for part in ("a", "b"))
        assert weights_hash(first) == weights_hash(second)
        assert first.done == second.done

    def test_order_and_batching_of_calibration_do_not_matter(
        self, step: Step, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tokens = tiny(family), random_tokens()
        expected = logits(run(step, model, middle(step), tmp_path / "a", tokens))
        monkeypatch.setattr("mariotte.compress.walk.BATCH_TOKENS", 3 * tokens.shape[1])
        found = logits(run(step, model, middle(step), tmp_path / "b", tokens.flip(0)))
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()

    def test_the_model_that_enters_stays_as_it_is(self, step: Step, family: str, tmp_path: Path) -> None:
        model = tiny(family, tied=True)
        before = weights_hash(model)
        cut = run(step, model, middle(step), tmp_path)
        with torch.no_grad():
            for parameter in cut.hf.parameters():
                parameter.add_(1.0)
        assert weights_hash(model) == before
        assert model.done == ()

    def test_saved_and_loaded_it_gives_the_same_logits(self, step: Step, family: str, tmp_path: Path) -> None:
        for tied in (False, True):
            cut = run(step, tiny(family, tied=tied), middle(step), tmp_path / f"prepared-{tied}")
            folder = checkpoint.save(cut, tmp_path / f"saved-{tied}")
            loaded = load(folder)
            assert torch.allclose(logits(loaded), logits(cut), atol=1e-4 * float(logits(cut).abs().max()))
            assert loaded.shape == cut.shape
            assert loaded.counts == cut.counts

    def test_stock_transformers_loads_it_and_generates(self, step: Step, family: str, tmp_path: Path) -> None:
        folder = checkpoint.save(run(step, tiny(family), middle(step), tmp_path / "prepared"), tmp_path / "saved")
        with quiet_transformers():
            kind = architectures.find(family).kind
            hf = LOADED_BY[kind].from_pretrained(folder, trust_remote_code=not step.makes_plain(tiny(family)))
            prompt = random_tokens(2, 5)
            if kind == "masked":  # which generates nothing
                assert bool(hf(prompt).logits.isfinite().all())
                return
            made = hf.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
            )
        assert cast(Tensor, made).shape[1] > (5 if kind == "causal" else 1)

    def test_gradients_flow_after_cutting(self, step: Step, family: str, tmp_path: Path) -> None:
        # Some families keep a table or a bias that is not used when the head is not tied.
        tied = architectures.find(family).kind != "causal"
        cut = run(step, tiny(family, tied=tied), middle(step), tmp_path)
        cut.hf.train()
        cut.logits(random_tokens(2, 8)).logsumexp(-1).sum().backward()
        for name, parameter in cut.hf.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert bool(parameter.grad.isfinite().all()), name
            else:
                assert not step.makes_plain(cut), f"{name} of a plain model is not trained"
        linears = [linear for block in cut.blocks for linear in (block.attention[0], block.ffn[-1])]
        assert all(linear.weight.grad is not None and bool(linear.weight.grad.any()) for linear in linears)

    def test_modules_and_config_say_what_the_weights_are(self, step: Step, family: str, tmp_path: Path) -> None:
        cut = run(step, tiny(family), middle(step), tmp_path)
        for module in cut.hf.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
        shape = cut.shape
        assert cut.embeddings.weight.shape == (shape.vocab, shape.hidden)
        assert cut.head.weight.shape == (shape.vocab, shape.final_size)
        for index, block in enumerate(cut.blocks):
            of_heads = shape.heads_of(index)[0] * shape.widths_of(index)[1]
            assert oriented(block.output).shape == (shape.attended_by(index), of_heads)
            # The first factor of a product reads, the last writes; a whole matrix does both.
            (_, first), *_, (_, last) = block.factors(block.entry.ffn_paths[-1]) * 2
            assert (len(oriented(last)), oriented(first).shape[1]) == (
                shape.written_by(index) * max(shape.experts, 1),
                shape.ffn_of(index),
            )
        assert cut.hf.config.to_dict() == type(cut.hf.config).from_dict(cut.hf.config.to_dict()).to_dict()

    @pytest.mark.parametrize("odd", ["dead parts", "tied", "odd widths", "one layer", "bfloat16", "few tokens"])
    def test_unusual_models_give_finite_logits(self, step: Step, family: str, tmp_path: Path, odd: str) -> None:
        model = {
            "dead parts": lambda: with_dead_parts(tiny(family)),
            "tied": lambda: tiny(family, tied=True),
            "odd widths": lambda: tiny(family, **{**ODD, **ODD_OF.get(family, {})}),
            "one layer": lambda: tiny(family, layers=1),
            "bfloat16": lambda: tiny(family, dtype=torch.bfloat16),
            "few tokens": lambda: tiny(family),
        }[odd]()
        context = context_of(model, tmp_path, random_tokens(1, 4) if odd == "few tokens" else None)
        prepared = prepare_once(step, model, context, amounts(step))
        for amount in amounts(step):
            cut = step.apply(model, prepared, amount, context)
            assert bool(logits(cut).isfinite().all()), f"{step.link(amount)} on a model with {odd}"
            assert cut.measured_params() == cut.counts.n_params
            assert {p.dtype for p in cut.hf.parameters()} == {p.dtype for p in model.hf.parameters()}

    def test_it_works_after_itself(self, step: Step, family: str, tmp_path: Path) -> None:
        once = run(step, tiny(family, tied=True), middle(step), tmp_path / "a")
        if step.family == "quantization":
            assert f"quantized yet, and {step.link(middle(step))} was done" in str(step.refuse(once))
            return
        twice = run(step, once, middle(step), tmp_path / "b")
        assert len(twice.done) == 2
        assert twice.measured_params() == twice.counts.n_params <= once.counts.n_params
        assert bool(logits(twice).isfinite().all())

    def test_impossible_requests_are_refused(self, step: Step, family: str, tmp_path: Path) -> None:
        for amount in (*([] if step.fixed is not None else [None]), "auto", 1.0, -0.1, 17):
            with pytest.raises(ChainError, match=step.name()):
                step.check_amount(step.name(), amount)
        with pytest.raises(ChainError, match=f"{step.name()} has no scope 'nowhere'"):
            replace(step, scope="nowhere")

    def test_too_little_text_is_refused_before_any_work(self, step: Step, family: str, tmp_path: Path) -> None:
        model = tiny(family)
        needed = reads_text(step, model, tmp_path / "none")
        for rows in (0, 1):
            context = context_of(model, tmp_path / str(rows), random_tokens(rows, 1))
            if needed:
                with pytest.raises(DataError) as raised:
                    prepare_once(step, model, context, amounts(step))
                assert is_a_sentence(raised.value, step)
                assert not context.scratch.exists()
            else:
                cut = step.apply(model, prepare_once(step, model, context, amounts(step)), middle(step), context)
                assert bool(logits(cut).isfinite().all())
        # Rows of one token each are enough for moments, but not for a loss.
        error = complaint(lambda: run(step, model, middle(step), tmp_path / "rows", random_tokens(8, 1)))
        assert error is None or (isinstance(error, DataError) and is_a_sentence(error, step))

    def test_numbers_that_are_not_finite_are_refused(self, step: Step, family: str, tmp_path: Path) -> None:
        for part, value in enumerate((math.nan, math.inf, -math.inf, math.nan)):
            model = tiny(family)
            last = model.blocks[-1]
            norm = model.final_norm if model.entry.final_norm else last.mlp_norm
            module = (model.embeddings, last.ffn[-1], norm, model.head)[part]
            cast(Tensor, module.weight).detach().view(-1)[3] = value
            context = context_of(model, tmp_path / str(part))
            with pytest.raises(ModelError, match=rf"tiny-{family} .*(weight|_proj) holds NaN or infinity: ") as raised:
                prepare_once(step, model, context, amounts(step))
            assert is_a_sentence(raised.value, step)
            assert not context.scratch.exists()
        model = overflowing(tiny(family))
        if reads_text(step, tiny(family), tmp_path / "reads"):
            with pytest.raises(ModelError, match=rf"tiny-{family}.*: check the checkpoint") as raised:
                run(step, model, middle(step), tmp_path / "activations")
            assert is_a_sentence(raised.value, step)
        else:
            assert run(step, model, middle(step), tmp_path / "activations").done

    def test_the_largest_amount_leaves_a_model_that_runs(self, step: Step, family: str, tmp_path: Path) -> None:
        if step.unit == "bits":
            pytest.skip("bits have a least number of their own")
        for name, model in (
            ("usual", tiny(family)),
            ("smallest", tiny(family, layers=1, hidden=8, heads=1, kv_heads=1, ffn=16)),
        ):
            cut = run(step, model, 1 - 1e-9, tmp_path / name)
            shape = cut.shape
            assert min(shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn) >= 1
            assert bool(logits(cut).isfinite().all())
            assert load(checkpoint.save(cut, tmp_path / f"saved {name}")).shape == shape

    def test_its_name_finds_it_and_its_link_is_canonical(self, step: Step, family: str) -> None:
        assert METHODS.find(step.name()) is type(step)
        assert type(step).reference
        assert (step.scope == step.scopes[0]) == (":" not in str(step.link(0.5)))


class FamilyConformance:
    """What a method promises on a family, in one short case of a model with a tied head; parametrise as above."""

    def test_it_does_what_it_says_and_nothing_else(self, step: Step, family: str, tmp_path: Path) -> None:
        model, amount = tiny(family, tied=True, **sizes_for(step)), middle(step)
        before = weights_hash(model)
        context = context_of(model, tmp_path / "prepared")
        prepared = prepare_once(step, model, context, [amount])
        cut = step.apply(model, prepared, amount, context)
        assert weights_hash(step.apply(model, prepared, amount, context)) == weights_hash(cut)
        assert weights_hash(model) == before
        (done,) = cut.done
        assert (done.step, done.scope) == (str(step.link(amount)), step.scope)
        assert cut.measured_params() == cut.counts.n_params
        if type(step).removes is not Step.removes:
            removed = model.measured_params() - cut.measured_params() + done.zeros
            assert abs(step.removes(model, amount) - removed) <= step.slack(model)
        said = logits(cut)
        assert bool(said.isfinite().all())
        assert not torch.equal(said, logits(model))
        if step.family in ("unstructured", "quantization"):
            # What layers share is there once, and counts once.
            assert len(cut.matrices(step.scope)) == len(model.matrices(step.scope))
            weights = sum(matrix.weight.numel() for matrix in model.matrices(step.scope))
            assert (done.in_scope or done.facts["weights"]) == weights
            assert done.zeros == (cut.zeros(step.scope) if done.in_scope else 0)
            saved = 4 * weights - done.facts["packed_bytes"] if step.family == "quantization" else 0
            assert cut.counts.n_bytes == 4 * cut.measured_params() - saved
            changed = {name for name, new in cut.hf.named_parameters() if not new.equal(model.hf.get_parameter(name))}
            matrices = model.paths(step.scope).items()
            assert changed == {path if isinstance(m, Stacked) else f"{path}.weight" for path, m in matrices}
        if step.scope in ("head", step.scopes[0]):
            loaded = load(checkpoint.save(cut, tmp_path / "saved"))
            assert torch.allclose(logits(loaded), said, atol=1e-4 * float(said.abs().max()))
            assert (loaded.shape, loaded.counts, loaded.done) == (cut.shape, cut.counts, cut.done)
