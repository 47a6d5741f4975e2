"""No assertion on how long anything takes: clocks are made up, real models are asked for what they computed."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mariotte.errors import ChainError, DataError
from mariotte.evaluate.base import Measurement
from mariotte.evaluate.measures import speed
from mariotte.evaluate.measures.speed import (
    MOST_ROUNDS,
    WARM_UP,
    Interval,
    Speed,
    Times,
    alternate,
    generate,
    median_interval,
    timer,
    verdict,
)
from mariotte.experiments import run as running
from mariotte.experiments.identity import measure_text, resolve_measure
from mariotte.experiments.pipeline import measure
from mariotte.experiments.study import parse
from mariotte.models.model import Model
from mariotte.store import open_store
from mariotte.testing.tiny import random_tokens, tiny


class Scripted:
    """Runs that take what they are told to, and a clock that counts it."""

    def __init__(self, *times: Sequence[Times]) -> None:
        self.times, self.now = [itertools.cycle(own) for own in times], 0.0
        self.order: list[int] = []

    def run(self, i: int) -> Callable[[], Times]:
        def one() -> Times:
            self.order.append(i)
            found = next(self.times[i])
            self.now += sum(found)
            return found

        return one

    def alternate(self, seconds: float = 100.0, rounds: int = 6) -> list[tuple[Times, ...]]:
        runs = [self.run(i) for i in range(len(self.times))]
        return alternate(runs, seconds=seconds, rounds=rounds, clock=lambda: self.now)


STEADY = [Times(2.0, 4.0)]
UNSTEADY = [Times(1.0, 3.0), Times(3.0, 1.0), Times(2.0, 2.0)]


def test_models_take_turns_and_the_order_turns_round() -> None:
    script = Scripted(STEADY, [Times(1.0, 4.0)])
    found = script.alternate()
    assert script.order[: 2 * WARM_UP] == [0] * WARM_UP + [1] * WARM_UP
    assert script.order[2 * WARM_UP :] == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert found == [(Times(2.0, 4.0), Times(1.0, 4.0))] * 6  # in the order of the models, whichever came first


def test_rounds_end_when_enough_is_known() -> None:
    assert len(Scripted(STEADY, STEADY).alternate(rounds=6)) == 6


def test_rounds_end_when_time_is_up_but_not_before_the_fewest() -> None:
    assert len(Scripted(UNSTEADY, STEADY).alternate(seconds=0.0, rounds=9)) == 9
    # A round takes 10 s after a warm-up that does not count.
    assert len(Scripted(UNSTEADY, STEADY).alternate(seconds=95.0, rounds=6)) == 10


def test_rounds_end_at_last() -> None:
    generator = random.Random(0)
    never_twice = [Times(generator.lognormvariate(0, 1), generator.lognormvariate(0, 1)) for _ in range(300)]
    assert len(Scripted(never_twice, STEADY).alternate(seconds=1e9)) == MOST_ROUNDS


def test_one_model_alone() -> None:
    assert Scripted(STEADY).alternate() == [(Times(2.0, 4.0),)] * 6


def test_nothing_is_collected_meanwhile_and_the_collector_comes_back() -> None:
    seen: list[bool] = []

    def run() -> Times:
        seen.append(gc.isenabled())
        return Times(1.0, 1.0)

    def broken() -> Times:
        if len(seen) > 2 * WARM_UP:
            raise RuntimeError
        return run()

    alternate([run], seconds=0.0, rounds=6)
    assert not any(seen[WARM_UP:])
    assert gc.isenabled()
    seen.clear()
    with pytest.raises(RuntimeError):
        alternate([run, broken], seconds=0.0, rounds=6)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([3, 1, 2], Interval(2, float("-inf"), float("inf"))),
        ([6, 1, 5, 2, 4, 3], Interval(3.5, 1, 6)),  # 2 / 2^6 = 3.1 % miss
        (list(range(1, 9)), Interval(4.5, 1, 8)),  # the second would miss 7 %
        (list(range(1, 10)), Interval(5, 2, 8)),  # 2 (1 + 9) / 2^9 = 3.9 %
        (list(range(1, 21)), Interval(10.5, 6, 15)),  # the usual table: ranks 6 and 15 of 20
    ],
)
def test_interval_of_a_median(numbers: list[float], expected: Interval) -> None:
    assert median_interval(numbers) == expected


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(2000):
        found = median_interval([generator.lognormvariate(0, 1) for _ in range(15)])
        held += found.lo <= 1 <= found.hi
    assert 0.95 <= held / 2000 <= 0.98  # 96.5 % with 15 numbers


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Interval(1.3, 1.1, 1.5), "faster"),
        (Interval(0.8, 0.7, 0.95), "slower"),
        (Interval(1.3, 0.9, 1.5), "inside the noise"),
        (Interval(1.0, 1.0, 1.0), "inside the noise"),
        (Interval(2.0, float("-inf"), float("inf")), "inside the noise"),
    ],
)
def test_verdicts(found: Interval, said: str) -> None:
    assert verdict(found) == said


@pytest.fixture
def dense() -> Model:
    return tiny("llama")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the models of one test take these times."""

    def script(times: dict[Model, Sequence[Times]]) -> None:
        own = {id(model): itertools.cycle(found) for model, found in times.items()}
        monkeypatch.setattr(speed, "generate", lambda model, *rest: next(own[id(model)]))

    return script


SPEED = Speed(batch=2, prompt=8, new=4, seconds=0.0)


def test_speedups_are_medians_of_the_rounds_ratios(dense: Model, scripted: Callable[..., None]) -> None:
    small = dense.copy()
    # A machine that slows down for some rounds slows both models: each round's ratio is unharmed.
    slow = [1, 1, 5, 5, 1, 1, 1]
    warm = [Times(9.0, 9.0)] * WARM_UP
    scripted(
        {
            dense: [*warm, *(Times(2.0 * f, 6.0 * f) for f in slow)],
            small: [*warm, *(Times(1.0 * f, 8.0 * f) for f in slow)],
        }
    )
    alone = Measurement(metrics={}, protocol={})
    found = SPEED.compare(small, dense, alone)
    assert found.metrics == {
        "prefill_tokens_per_s": 2 * 8 / 1.0,
        "decode_tokens_per_s": 2 * 4 / 8.0,
        "speedup_prefill": 2.0,
        "speedup_prefill_se": 0.0,
        "speedup_decode": 0.75,
        "speedup_decode_se": 0.0,
    }
    # The dense model's speed in these very rounds, not the one that was measured alone.
    assert found.base == {
        "prefill_tokens_per_s": 2 * 8 / 2.0,
        "decode_tokens_per_s": 2 * 4 / 6.0,
        "speedup_prefill": 1.0,
        "speedup_decode": 1.0,
    }
    assert found.details["rounds"] == 7
    assert found.details["prefill"]["change"] == 1.0
    assert found.details["prefill"]["verdict"] == "faster"
    assert found.details["decode"] == {
        "seconds": {"median": 8.0, "q1": 8.0, "q3": 24.0},
        "dense_seconds": {"median": 6.0, "q1": 6.0, "q3": 18.0},
        "speedup": 0.75,
        "interval": [0.75, 0.75],
        "change": -0.25,
        "verdict": "slower",
    }


def test_a_difference_inside_the_noise_is_said_to_be(dense: Model, scripted: Callable[..., None]) -> None:
    small = dense.copy()
    scripted({dense: STEADY, small: [Times(t, 2.0) for t in (1.5, 2.5, 1.8, 1.9, 2.2, 1.7, 1.6, 1.95, 2.1)]})
    found = SPEED.compare(small, dense, Measurement(metrics={}, protocol={}))
    assert found.details["prefill"]["verdict"] == "inside the noise"
    assert found.details["decode"]["verdict"] == "faster"
    assert found.metrics["speedup_prefill_se"] > 0
    lo, hi = found.details["prefill"]["interval"]
    assert lo < 1 < hi


def test_the_dense_model_has_no_speedup_by_definition(dense: Model, scripted: Callable[..., None]) -> None:
    scripted({dense: STEADY})
    found = SPEED.measure(dense)
    assert found.metrics["speedup_decode"] == found.metrics["speedup_prefill"] == 1.0
    assert found.metrics["prefill_tokens_per_s"] == 2 * 8 / 2.0
    # Without the dense model beside it a compressed one has none: the two were not timed together.
    assert not [name for name in SPEED.measure(dense, found).metrics if "speedup" in name]


def test_metrics_are_those_that_it_declares(dense: Model) -> None:
    found = SPEED.compare(dense.copy(), dense, SPEED.measure(dense))
    assert {name.removesuffix("_se") for name in found.metrics} == set(Speed.metrics)
    assert set(SPEED.measure(dense).metrics) == set(Speed.metrics)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_it_writes_what_the_model_would_without_a_cache(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_type)
    fed: list[torch.Tensor] = []
    forward = model.hf.forward

    def watched(**given: torch.Tensor) -> object:
        fed.append(given["input_ids"])
        return forward(**given)

    monkeypatch.setattr(model.hf, "forward", watched)
    prompt_BT = random_tokens(2, 9)
    assert all(seconds >= 0 for seconds in generate(model, prompt_BT, 5))
    assert [tuple(tokens.shape) for tokens in fed] == [(2, 9)] + [(2, 1)] * 5
    whole_BT = torch.cat(fed, 1)
    monkeypatch.undo()
    with torch.no_grad():
        expected_BT = model.logits(whole_BT).argmax(-1)
    assert torch.equal(whole_BT[:, 9:], expected_BT[:, 8:-1])


def test_both_models_read_the_same_tokens(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[torch.Tensor] = []

    def watched(model: Model, prompt_BT: torch.Tensor, new: int, clock: str) -> Times:
        prompts.append(prompt_BT)
        return Times(1.0, 1.0)

    monkeypatch.setattr(speed, "generate", watched)
    SPEED.compare(dense.copy(), dense, Measurement(metrics={}, protocol={}))
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)
    assert prompts[0].shape == (2, 8)


def test_the_protocol_says_where_and_that_it_cannot_be_repeated(dense: Model) -> None:
    found = SPEED.protocol(dense)
    assert found["repeatable"] is False
    assert found["device"] == "cpu"
    assert found["hardware"]
    assert found["threads"] == torch.get_num_threads()
    assert (found["batch"], found["prompt"], found["new"], found["dtype"]) == (2, 8, 4, "float32")
    assert SPEED.measure(dense).protocol == found
    assert dataclasses.replace(SPEED, new=5).protocol(dense) != found


def test_what_it_is_measured_on_goes_without_saying() -> None:
    assert resolve_measure("speed(batch=2)") == resolve_measure("speed:random(batch=2)") == Speed(batch=2)
    assert measure_text(Speed(batch=2)) == "speed:random(batch=2)"


def test_a_study_times_each_cut_beside_the_dense_model(model_folder: Path, tmp_path: Path) -> None:
    study = parse(
        f"""
        format = 1
        name = "timed"
        models = ["{model_folder}"]
        measures = ["speed(prompt=4, new=1, seconds=0)"]
        chains = ["magnitude@0.5"]
        """
    )
    hashes: list[dict[str, str]] = []
    for name in ("one.db", "two.db"):
        with open_store(tmp_path / name, create=True) as store:
            assert not running.run(study, store).failures
            records = store.records()
        hashes.append({record.id: record.result_hash() for record in records})
        (cut,) = (record for record in records if record.method)
        assert cut.base["speedup_decode"] == 1.0
        assert cut.metrics["speedup_decode"] == cut.details["decode"]["speedup"]
        assert cut.base["decode_tokens_per_s"] == 1 / cut.details["decode"]["dense_seconds"]["median"]
    assert hashes[0] == hashes[1]  # two timings differ, and are the same result all the same


def test_from_python_with_the_dense_model_at_hand(dense: Model) -> None:
    what = "speed(prompt=4, new=1, seconds=0)"
    assert "verdict" in measure(dense.copy(), what, reference=dense).details["decode"]
    assert "verdict" not in measure(dense, what).details["decode"]


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_timer_of_a_cpu_goes_on(clock: str) -> None:
    stop = timer(torch.device("cpu"), clock)()
    assert 0 <= stop() <= stop()


def test_the_clock_of_the_processor_is_one_threads(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    by_cpu = dataclasses.replace(SPEED, clock="cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert by_cpu.measure(dense).protocol["clock"] == "cpu"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ChainError, match="clock=cpu counts the work of one thread of a CPU, got 2 on cpu"):
        by_cpu.protocol(dense)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on": "wikitext2"}, "speed is measured on random tokens, got 'wikitext2': write speed:random"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"prompt": 0}, "prompt must be at least 1"),
        ({"new": 0}, "new must be at least 1"),
        ({"rounds": 5}, "rounds must be at least 6, got 5: fewer cannot tell"),
        ({"seconds": -1.0}, "seconds must be 0 or more"),
        ({"clock": "sun"}, "clock must be wall or cpu, got 'sun'"),
        ({"seconds": float("inf")}, "seconds must be 0 or more"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ChainError, match=said):
        Speed(**fields)


def test_more_tokens_than_positions_are_refused(dense: Model) -> None:
    with pytest.raises(DataError, match="speed: a window of 129 tokens is longer than the 128 positions"):
        Speed(prompt=120, new=9).protocol(dense)
