"""A paper's claims on records that obey it, that contradict it, and that cannot say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from mariotte.report.claim import Claim, curves, exponent, interval, power
from mariotte.report.claims import PAPERS
from mariotte.report.page import build, followed
from mariotte.store.record import Record
from tests.report.report_records import record

MODELS = {"a": (50_000, "qwen2"), "b": (120_000, "qwen2"), "c": (320_000, "qwen2"), "d": (300_000, "llama")}
AMOUNTS = (0.1, 0.3, 0.5, 0.7, 0.9)
DENSE_LOSS, DENSE_ACCURACY = 1.5, 0.9


def grid(
    loss: Callable[[str, str, float], float],
    accuracy: Callable[[str, str, float], float],
    *,
    recovered: Callable[[float], float] | None = None,
    speed: Callable[[str, float], float] | None = None,
    methods: tuple[str, ...] = ("prunenet-random", "slicegpt"),
    amounts: tuple[float, ...] = AMOUNTS,
) -> list[Record]:
    """Records of a study in the paper's design, with values as functions of model, method and ratio."""
    found: list[Record] = []
    for name, (size, model_type) in MODELS.items():
        for method in methods:
            for r in amounts:

                def add(
                    chain: str,
                    measure: str,
                    metrics: dict[str, float],
                    base: dict[str, float],
                    recovery: str | None = None,
                    *,
                    name: str = name,
                    size: int = size,
                    model_type: str = model_type,
                    method: str = method,
                    r: float = r,
                ) -> None:
                    made = record(name, chain, measure, metrics, base, method=method, amount=r)
                    found.append(
                        replace(
                            made,
                            model_type=model_type,
                            base_params=size,
                            n_params=round(size * (1 - 0.7 * r)),
                            ratio=0.7 * r,
                            recovery=recovery,
                            recovery_tokens=4000 if recovery else 0,
                        )
                    )

                cut, value = f"{method}@{r}", loss(name, method, r)
                add(cut, "loss:testbed/news", {"loss": value}, {"loss": DENSE_LOSS})
                score = accuracy(name, method, r)
                add(cut, "tasks:testbed", {"accuracy": score, "facts": score}, {"accuracy": 0.9, "facts": 0.9})
                if recovered is not None:
                    after = {"loss": recovered(value)}
                    add(f"{cut} | lora@4k", "loss:testbed/news", after, {"loss": DENSE_LOSS}, "lora")
                if speed is not None:
                    times = {"speedup_prefill": speed(name, r), "speedup_decode": 1.0, "speedup_decode_se": 0.01}
                    add(cut, "speed:random", times, {"speedup_prefill": 1.0, "speedup_decode": 1.0})
    return found


def as_published(name: str, method: str, r: float) -> float:
    return DENSE_LOSS * (1 + r) ** published_beta(name, method)


def published_beta(name: str, method: str) -> float:
    return 1.6 if method == "slicegpt" else 2.0 + {"a": -0.2, "b": 0.2, "c": -0.1, "d": 0.1}[name]


def linear(name: str, method: str, r: float) -> float:
    falls = {50_000: 0.8, 120_000: 1.0, 320_000: 1.2, 300_000: 1.1}[MODELS[name][0]]
    return DENSE_ACCURACY * (1 + r) ** -falls


def verdicts(paper: str, records: list[Record]) -> dict[str, Claim]:
    return {claim.sentence.split(" ")[1]: claim for claim in PAPERS.find(paper)().claims(records)}


def test_what_obeys_the_paper_holds() -> None:
    found = verdicts(
        "compression-laws",
        grid(
            as_published,
            linear,
            recovered=lambda value: 0.45 * value,
            speed=lambda name, r: 1.6 if name == "c" else 1.2,
        ),
    )
    said = {key: claim.verdict for key, claim in found.items()}
    assert said["loss"] == "holds", found["loss"]
    assert said["accuracy"] == "holds", found["accuracy"]
    assert said["by"] == "holds"
    assert said["a"] == "holds"  # speed
    assert said["with"] == "holds"
    assert "55% " in found["by"].statistic
    assert "+60%" in found["a"].statistic
    assert "+20%" in found["a"].statistic


def test_what_contradicts_the_paper_does_not_hold() -> None:
    found = verdicts(
        "compression-laws",
        grid(
            lambda name, method, r: DENSE_LOSS * (1 + r) ** (6.0 if method == "slicegpt" else 5.0),
            lambda name, method, r: DENSE_ACCURACY * (1 + r) ** -4.0,
            recovered=lambda value: 0.95 * value,
            speed=lambda name, r: 1.1,
        ),
    )
    assert [claim.verdict for key, claim in found.items() if key in ("loss", "accuracy", "by", "a", "with")] == [
        "does not hold"
    ] * 5
    assert "β = 5" in found["loss"].statistic


def test_critical_ratios_are_ranked_within_families() -> None:
    claim = verdicts("compression-laws", grid(as_published, linear))["critical"]
    # Three sizes of one family in the claimed order: one of six orders, or two with its contrary.
    assert "mean rank correlation with size -1.00, p = 0.33" in claim.statistic
    assert claim.verdict == "not settled"
    ratios = [math.expm1(math.log(0.8) / -falls) for falls in (0.8, 1.0, 1.2)]
    assert f"qwen2 {', '.join(f'{r:.2f}' for r in ratios)}" in claim.statistic


def test_records_that_cannot_say_are_not_testable() -> None:
    for paper in PAPERS.names():
        for claim in PAPERS.find(paper)().claims([]):
            assert claim.verdict == "not testable here"
            assert claim.statistic.startswith("no ")


def test_small_and_light_against_large_and_heavy() -> None:
    def size_wins(name: str, method: str, r: float) -> float:
        return 1 + 1e4 / MODELS[name][0] + r

    claim = verdicts("compression-laws", grid(size_wins, linear))["small"]
    assert claim.verdict == "holds", claim


def test_pruning_laws_on_an_exact_law_and_on_none() -> None:
    nine = tuple(i / 10 for i in range(1, 10))

    def exact(name: str, method: str, r: float) -> float:
        return DENSE_ACCURACY * 0.98 * (1 - r) ** 0.7

    found = verdicts("pruning-laws", grid(lambda n, m, r: 1 / exact(n, m, r), exact, amounts=nine))
    assert found["on"].statistic.startswith("0.000 ")
    assert [found[key].verdict for key in ("on", "coefficients")] == ["holds", "holds"]

    noise = random.Random(0)
    wild = grid(lambda n, m, r: 1 + 9 * noise.random(), lambda n, m, r: noise.random(), amounts=nine)
    assert next(claim.verdict for claim in PAPERS.find("pruning-laws")().claims(wild)) == "does not hold"


def test_the_fits_are_those_of_the_laws() -> None:
    records = grid(as_published, linear)
    for curve in curves(records, "loss"):
        assert exponent([curve]) == pytest.approx(published_beta(curve.model, curve.method))
    (first, *_) = curves(grid(lambda n, m, r: 1.3 * (1 - r) ** -0.5, linear, methods=("ffn",)), "loss")
    level, alpha = power(first)
    assert math.exp(level) * DENSE_LOSS == pytest.approx(1.3)
    assert alpha == pytest.approx(-0.5)


def test_an_interval_draws_clusters() -> None:
    low, high = interval([[1.0] * 50, [3.0] * 50], lambda some: sum(some) / len(some))
    assert (low, high) == (1.0, 3.0)  # two clusters, however many points each has


def test_the_page_of_a_study_that_follows_a_paper_has_its_claims_near_the_top() -> None:
    records = grid(as_published, linear)
    page = build(records, runs=[{"toml": 'follows = "compression-laws"', "counters": {}, "cost": {"seconds": 1.0}}])
    assert "What Compression Laws for Large Language Models says" in page
    assert page.index("The loss grows quadratically") < page.index("What was run")
    assert "What Compression Laws" not in build(records)
    assert "What Pruning Laws says" in build(records, claims=["pruning-laws"])
    assert followed([{"toml": ""}, {}], ["pruning-laws"]) == ["pruning-laws"]
