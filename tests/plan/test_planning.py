"""Plans on the testbed, each model held out of what is known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import mariotte
from mariotte.errors import MariotteError, UnknownNameError
from mariotte.locate import config_of
from mariotte.plan import execute, planner, probe, read_budget
from mariotte.plan.answer import Forecast
from mariotte.plan.pool import Entry, Parted, of_records, parted, shipped, without
from mariotte.plan.ranking import Planner
from mariotte.plan.speed import Calibration, write_calibration
from mariotte.store.record import Record

MODEL = "testbed/qwen2-1m"
LOSS = "loss:testbed/encyclopedia(rows=160)"


def held_out(model: str = MODEL, **budget: object) -> Planner:
    return planner(model, read_budget(**(budget or {"max_loss": "+5%"})), pool=without(shipped(), model), step=0.1)  # type: ignore[arg-type]


def replayed(model: str = MODEL):  # type: ignore[no-untyped-def]
    """A bench that answers from the shipped records, and counts what it was asked."""
    known = {(e.chain, e.measure): e for e in shipped() if e.model == model and e.metric == "loss"}
    asked: list[str] = []

    def bench(chains: list[str], measures: list[str]) -> list[Record]:
        asked.extend(chains)
        return [_record(known[chain, measure]) for chain in chains for measure in measures]

    return bench, asked


def _record(entry: Entry) -> Record:
    return Record(
        id=entry.chain,
        experiment=entry.chain,
        study="probes",
        model=entry.model,
        model_type=entry.family,
        model_hash="",
        chain=entry.chain,
        seed=0,
        measure=entry.measure,
        metrics={entry.metric: entry.value},
        base={entry.metric: entry.base},
        protocol=_Known(entry.protocol),
        n_params=int(entry.n_params),
        n_params_non_embedding=0,
        base_params=int(entry.params),
        n_bytes=int(entry.n_bytes),
        flops_per_token=1.0,
        obtained=entry.obtained,
    )


class _Known(dict):  # type: ignore[type-arg]
    """A protocol whose digest is the one of the shipped row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("mariotte.plan.pool.protocol_of", lambda measure, protocol: protocol.text)
    return replayed()


def test_a_plan_needs_no_torch_pandas_or_altair() -> None:
    code = (
        "import sys, mariotte\n"
        f"found = mariotte.plan({MODEL!r}, mariotte.read_budget(max_loss='+5%', bytes='60%'))\n"
        "assert found.winner is not None\n"
        "print(sorted({'torch', 'pandas', 'altair', 'transformers', 'scipy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unseen_model_is_planned_with_intervals() -> None:
    found = held_out().plan()
    assert found.winner is not None
    (forecast,) = found.winner.quality
    assert forecast.lo <= forecast.mean <= forecast.hi
    assert forecast.limit == pytest.approx(1.05 * forecast.base)
    assert found.winner.probability >= 0.8
    assert 0 < found.winner.saving < 1
    assert [option.meets for option in found.options] == sorted((o.meets for o in found.options), reverse=True)
    assert any("no cut of" in sentence for sentence in found.unknowns)


def test_more_allowed_loss_never_saves_less() -> None:
    savings = [held_out(max_loss=text).plan(experiments=0).winner.saving for text in ("+2%", "+5%", "+10%", "+30%")]  # type: ignore[union-attr]
    assert savings == sorted(savings)


def test_wanting_to_be_surer_never_saves_more() -> None:
    savings = [
        held_out(max_loss="+5%", sure=sure).plan(experiments=0).winner.saving  # type: ignore[union-attr]
        for sure in (0.5, 0.8, 0.95)
    ]
    assert savings == sorted(savings, reverse=True)


@pytest.mark.parametrize("probed", [(), ("ffn@0.5",), ("ffn@0.3", "ffn@0.7", "slice@0.2")])
def test_more_of_a_chain_never_does_less_damage(probed: tuple[str, ...], replay) -> None:  # type: ignore[no-untyped-def]
    bench, _ = replay
    known = held_out(max_loss="+5%", bytes="90%", recovery_tokens="64k")
    if probed:
        known = known.learned(of_records(bench(list(probed), [LOSS])))
    (quality,) = known.qualities
    forecasts = quality.forecasts([c.asked for c in known.candidates])
    found: dict[Parted, list[tuple[float, Forecast]]] = {}
    for candidate, forecast in zip(known.candidates, forecasts, strict=True):
        found.setdefault(candidate.asked.parts, []).append((candidate.asked.amount, forecast))
    assert len(found) > 20
    for curve in found.values():
        ordered = [f for _, f in sorted(curve, key=lambda pair: pair[0])]
        for name in ("lo", "mean", "hi"):
            values = [getattr(f, name) for f in ordered if name == "mean" or not f.measured]
            assert values == sorted(values)
        sure = [f.probability for f in ordered]
        assert sure == sorted(sure, reverse=True)


def test_own_records_are_known_and_not_predicted() -> None:
    found = planner(MODEL, read_budget(max_loss="+5%"), step=0.1).plan(experiments=0)
    measured = {e.chain: e.value for e in shipped() if e.model == MODEL and e.measure == LOSS}
    for option in found.options:
        assert option.quality[0].measured
        assert option.quality[0].mean == pytest.approx(measured[option.chain])


def test_experiments_begin_mild_and_say_what_they_gain() -> None:
    found = held_out(max_loss="+5%").plan(experiments=3)
    first = found.experiments[0]
    assert first.gain > 0
    assert "first point" in first.why
    forecast = {o.chain: o.quality[0] for o in found.options}[first.chain]
    assert forecast.mean <= forecast.limit  # type: ignore[operator]


def test_probes_narrow_the_choice_and_are_not_repeated(replay) -> None:  # type: ignore[no-untyped-def]
    bench, asked = replay
    before = held_out()
    after = probe(before, 3, bench)
    assert 2 <= len(asked) <= 3  # fewer where nothing would change the decision
    assert len(set(asked)) == len(asked)
    first, last = before.plan().winner, after.plan().winner
    assert first is not None
    assert last is not None
    assert last.saving >= first.saving
    width = [o.quality[0].hi - o.quality[0].lo for o in before.plan().options if o.chain == last.chain]
    assert last.quality[0].hi - last.quality[0].lo < width[0]
    assert list(after.plan().probes) == asked


def test_a_winner_is_verified_beside_its_prediction(replay) -> None:  # type: ignore[no-untyped-def]
    bench, _ = replay
    found = execute(held_out(), bench)
    (one,) = found.verified
    assert found.winner is not None
    assert one.predicted == found.winner.quality[0]
    measured = next(e.value for e in shipped() if (e.model, e.chain, e.measure) == (MODEL, found.winner.chain, LOSS))
    assert one.measured == measured
    assert one.inside == (one.predicted.lo <= measured <= one.predicted.hi)
    assert one.kept == (measured <= one.predicted.limit)  # type: ignore[operator]


def test_a_bench_that_measures_otherwise_is_refused(replay) -> None:  # type: ignore[no-untyped-def]
    bench, _ = replay

    def otherwise(chains: list[str], measures: list[str]) -> list[Record]:
        return [replace(record, protocol=_Known("loss:else#0")) for record in bench(chains, measures)]

    with pytest.raises(MariotteError, match="of another protocol"):
        probe(held_out(), 1, otherwise)
    with pytest.raises(MariotteError, match="came back otherwise"):
        execute(held_out(), otherwise)


def test_bytes_are_met_by_quantizing_and_cutting() -> None:
    found = held_out(max_loss="+10%", bytes="30%").plan(experiments=0)
    assert found.winner is not None
    assert found.winner.bytes_share <= 0.3
    assert "rtn" in found.winner.chain
    assert any("damages add" in sentence for sentence in found.unknowns)
    assert any("rtn@4 and rtn@3 are simulated" in sentence for sentence in found.unknowns)
    assert not any("nothing was measured" in sentence for sentence in found.unknowns)
    assert not any("simulated" in sentence for sentence in held_out().plan(experiments=0).unknowns)


def test_a_quantizer_of_which_nothing_is_known_is_said() -> None:
    pool = [e for e in without(shipped(), MODEL) if not e.chain.startswith("rtn@3")]
    found = planner(MODEL, read_budget(max_loss="+10%", bytes="60%"), pool=pool, step=0.1).plan(experiments=0)
    said = [sentence for sentence in found.unknowns if "nothing was measured" in sentence]
    assert said == ["what rtn@3 costs such a model: nothing was measured, so no chain here has it"]
    assert not any("rtn@3" in option.chain for option in found.options)


def test_recovery_is_used_where_it_may_be() -> None:
    without_it = held_out(max_loss="+5%").plan(experiments=0)
    with_it = held_out(max_loss="+5%", recovery_tokens="64k").plan(experiments=0)
    assert not any(o.recovery_tokens for o in without_it.options)
    assert any(o.recovery_tokens for o in with_it.options)
    assert with_it.winner.saving >= without_it.winner.saving  # type: ignore[union-attr]


def test_facts_can_be_a_floor_beside_the_loss() -> None:
    found = held_out(max_loss="+5%", keep=["knowledge.top1 >= -10pp"]).plan(experiments=0)
    assert [f.metric for f in found.winner.quality] == ["loss", "top1"]  # type: ignore[union-attr]
    assert found.winner.saving <= held_out().plan(experiments=0).winner.saving  # type: ignore[union-attr]


def test_smaller_models_of_the_family_are_rivals() -> None:
    rivals = held_out("testbed/llama-1m", max_loss="+5%").plan(experiments=0).rivals
    assert [r.model for r in rivals] == ["testbed/llama-483k", "testbed/llama-146k"]
    assert all(r.verdict in ("compress", "take the small one", "undecided") for r in rivals)
    bases = {e.model: e.base for e in shipped() if e.measure == LOSS}
    assert all(r.value == pytest.approx(bases[r.model]) for r in rivals)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"bytes": "1kB"}, "as small as 1kB"),
        ({"memory": "10kB", "max_loss": "+5%"}, "runs .* in 10kB"),
        ({}, "must ask for something"),
        ({"keep": ["wit >= -2pp"]}, "no number of 'wit'"),
        ({"max_loss": "+5%", "speedup": "1.3x"}, "doctor --bench"),
    ],
)
def test_impossible_budgets_are_one_sentence(budget: dict[str, object], said: str, monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MARIOTTE_CACHE", str(tmp_path))
    with pytest.raises(MariotteError, match=said) as raised:
        planner(MODEL, read_budget(**budget)).plan()  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_of_what_certainly_breaks_a_floor_the_mildest_comes_first() -> None:
    found = planner(MODEL, read_budget(max_loss="+0.000001%")).plan(experiments=0)
    hopeless = [option.quality[0].mean for option in found.options if option.probability == 0]
    assert len(hopeless) > 10
    assert hopeless == sorted(hopeless)


def test_a_floor_that_nothing_keeps_has_no_winner() -> None:
    found = held_out("testbed/qwen2-46k", max_loss="+0.0001%").plan(experiments=0)
    assert found.winner is None
    assert not any(option.meets for option in found.options)
    with pytest.raises(MariotteError, match="allow more"):
        execute(held_out("testbed/qwen2-46k", max_loss="+0.0001%"), lambda chains, measures: [])


@pytest.mark.parametrize(
    ("model", "error"),
    [("testbed/qwen2-1b", UnknownNameError), ("./nowhere", MariotteError), ("no such model", MariotteError)],
)
def test_models_that_are_not_there_are_refused(model: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        planner(model, read_budget(max_loss="+5%"))


def test_speed_is_predicted_where_it_was_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARIOTTE_CACHE", str(tmp_path))
    write_calibration(
        Calibration(
            machine="here",
            device="cpu",
            dtype="float32",
            threads=1,
            flops_per_s=5e10,
            bytes_per_s=1e10,
            operation_s=1e-6,
            measured="2026-01-01",
        )
    )
    found = held_out(max_loss="+100%", speedup="1.1x", price_per_hour=2.0).plan(experiments=0)
    assert found.winner is not None
    assert found.winner.speedup is not None
    assert found.winner.speedup >= 1.1
    assert found.winner.money == pytest.approx(2.0 * found.winner.gpu_hours)  # type: ignore[operator]
    by_chain = {o.chain: o for o in found.options}
    fewer, more = by_chain["ffn@0.2"], by_chain["ffn@0.8"]
    assert more.latency_s < fewer.latency_s  # type: ignore[operator]
    (tmp_path / "speed.json").write_text("{")
    with pytest.raises(MariotteError, match="doctor --bench"):
        held_out()


def test_a_plan_becomes_json() -> None:
    found = held_out(max_loss="+5%").plan()
    assert json.loads(json.dumps(found.plain()))["winner"]["chain"] == found.winner.chain  # type: ignore[union-attr]


def test_the_package_can_be_called_like_the_function() -> None:
    budget = read_budget(max_loss="+5%")
    assert mariotte.plan(MODEL, budget) == mariotte.plan.search.plan(MODEL, budget)


def test_chains_have_parts_in_one_order() -> None:
    found = parted("ffn@0.3(criterion=norm) | lora@64k | rtn@4")
    assert found is not None
    assert (found.cut, found.recovery, found.quantizer) == ("ffn(criterion=norm)", "lora@64k", "rtn@4")
    several = parted("ffn@0.3 | slice@0.2 | gptq@4")
    assert several is not None
    assert (several.cuts, several.combined, several.quantizer) == (("ffn", "slice"), True, "gptq@4")
    for wrong in ("ffn@0.3 | lora@64k | slice@0.2", "int8 | ffn@0.3", "ffn@0.3 | int8 | lora@64k"):
        assert parted(wrong) is None


def folder_of(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config_of(name))))
    return folder


def test_a_model_from_elsewhere_is_planned_from_published_tables(tmp_path: Path) -> None:
    found = planner(str(folder_of(MODEL, tmp_path)), read_budget(max_loss="+20%")).plan()
    assert found.measures == ("loss:wikitext2",)
    said = " ".join(found.unknowns)
    assert "published tables" in said
    assert "the median of other models" in said
    assert "far from the" in said
    assert {option.chain.partition("@")[0] for option in found.options} == {"ffn", "slice", "slicegpt", "shortgpt"}


def test_what_is_measured_goes_before_what_is_published(tmp_path: Path, replay) -> None:  # type: ignore[no-untyped-def]
    bench, _ = replay
    folder = str(folder_of(MODEL, tmp_path))

    def renamed(chains: list[str], measures: list[str]) -> list[Record]:
        return [replace(record, model=folder) for record in bench(chains, measures)]

    before = planner(folder, read_budget(max_loss="+20%"), measure=LOSS, step=0.1)
    after = probe(before, 1, renamed)
    (quality,) = after.qualities
    base = next(e.base for e in shipped() if (e.model, e.measure) == (MODEL, LOSS))
    assert before.qualities[0].assumed
    assert not quality.assumed
    assert quality.base == base
    assert quality.protocol != before.qualities[0].protocol
    (one,) = execute(before, renamed).verified
    assert one.predicted.base == base


def test_decoders_say_nothing_of_encoders() -> None:
    for model in ("testbed/bert-181k", "testbed/t5-265k"):
        with pytest.raises(MariotteError, match="no number of 'loss' is known for such models"):
            planner(model, read_budget(max_loss="+5%"))
