"""The published theorem, corollary and critical ratios, by number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mariotte.laws import fit
from mariotte.laws.base import Inputs, Point
from mariotte.laws.catalogue import find
from mariotte.laws.forms.compression_law import CompressionLaw
from mariotte.laws.published import coefficients

# The extrinsic r_crit(0.8) that follows from each model's published β, computed once outside this package.
CRITICAL = {
    "Qwen-2.5-0.5B": 0.417,
    "Qwen-2.5-1.5B": 0.250,
    "Qwen-2.5-3B": 0.206,
    "Qwen-2.5-7B": 0.181,
    "Qwen-2.5-14B": 0.159,
    "LLaMA-3.2-1B": 0.450,
    "LLaMA-3.2-3B": 0.322,
    "LLaMA-3-8B": 0.208,
}


def published(scope: str, metric: str) -> tuple[float, float, float]:
    (row,) = [r for r in coefficients() if r["scope"] == scope and r["metric"] == metric and r["form"] == "f(L0,r,D)"]
    return float(row["alpha"]), float(row["beta"]), float(row["gamma"])


def kept(theta: tuple[float, float, float], base: float, ratio: float, tokens: float) -> float:
    """L / L0^α."""
    value = CompressionLaw().f(np.array(theta), Inputs.at(base, ratio, tokens))[0]
    return float(value / base ** theta[0])


@pytest.mark.parametrize(("model", "expected"), CRITICAL.items())
def test_critical_ratios_of_the_published_table(model: str, expected: float):
    beta = published(model, "extrinsic")[1]
    assert round(CompressionLaw.critical_ratio(beta, 0.8), 3) == expected


def test_the_example_in_the_text():
    _, beta, gamma = published("LLaMA-3-8B", "extrinsic")
    assert round(2**beta, 3) == 0.441
    # "needs" less than one sample: D is a dummy.
    assert CompressionLaw.tokens_needed(beta, gamma, 0.15, 0.8) == pytest.approx(0.94, abs=0.005)


@pytest.mark.parametrize("metric", ["extrinsic", "intrinsic"])
@pytest.mark.parametrize("model", CRITICAL)
def test_theorem_31_holds_on_both_sides_of_its_bound(model: str, metric: str):
    theta = published(model, metric)
    _, beta, gamma = theta
    base = 0.6 if metric == "extrinsic" else 2.1
    better = (lambda v, s: v >= s) if metric == "extrinsic" else (lambda v, s: v <= s)
    for sigma in (0.5, 0.7, 0.8, 0.9, 0.97) if metric == "extrinsic" else (1.05, 1.2, 1.5, 2.5):
        for ratio in (0.01, 0.1, 0.3, 0.6, 0.9):
            needed = CompressionLaw.tokens_needed(beta, gamma, ratio, sigma)
            if math.isinf(needed):
                assert not better(kept(theta, base, ratio, 1e12), sigma)
                continue
            assert better(kept(theta, base, ratio, needed * (1 + 1e-6) + 1e-9), sigma)
            if needed > 0:
                assert not better(kept(theta, base, ratio, needed * (1 - 1e-6)), sigma)


@pytest.mark.parametrize(("metric", "inside", "outside"), [("extrinsic", 0.8, 0.3), ("intrinsic", 1.3, 6.0)])
def test_corollary_32_separates_what_can_be_recovered(metric: str, inside: float, outside: float):
    _, beta, gamma = published("LLaMA-3-8B", metric)
    critical = CompressionLaw.critical_ratio(beta, inside)
    assert 0 < critical < 1
    assert math.isfinite(CompressionLaw.tokens_needed(beta, gamma, critical * (1 - 1e-9), inside))
    assert math.isinf(CompressionLaw.tokens_needed(beta, gamma, critical * (1 + 1e-9), inside))
    # Beyond 2^β on the easy side, every ratio can be recovered.
    assert CompressionLaw.critical_ratio(beta, outside) > 1
    assert math.isfinite(CompressionLaw.tokens_needed(beta, gamma, 0.999, outside))


@pytest.fixture(scope="module")
def fitted():
    alpha, beta, gamma = published("all models, calibration-free", "intrinsic")
    points = [
        Point(
            value=base**alpha * (1 + ratio) ** beta * (1 + 1 / (tokens + 1)) ** gamma,
            base=base, ratio=ratio, tokens=tokens, ratio_kind="parameters", metric="loss", protocol="p",
            model=f"{base}",
        )
        for base in (1.9, 2.4, 3.1)
        for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)
        for tokens in (0, 1000, 4000, 25000)
    ]  # fmt: skip
    return fit("compression-law", points)


def test_refitting_published_exponents_returns_them(fitted):
    np.testing.assert_allclose(fitted.theta, [0.63, 1.72, 1.16], rtol=1e-9)


def test_critical_relative_to_the_law_is_the_corollary(fitted):
    for sigma in (1.05, 1.3, 2.0):
        found = fitted.critical(sigma, "law")
        assert found.r == pytest.approx(sigma ** (1 / 1.72) - 1, rel=1e-9)
    assert fitted.critical(3.9, "law").status == "unreachable"  # above 2^β = 3.29


def test_critical_relative_to_the_base_solves_the_law(fitted):
    found = fitted.critical(1.05, base=1.9, tokens=25000)
    assert found.status == "ok"
    assert fitted.predict(found.r, base=1.9, tokens=25000).mean == pytest.approx(1.05 * 1.9, rel=1e-12)


def test_the_boundary_condition_fails_as_documented(fitted):
    assert fitted.predict(0.0, base=2.4, tokens=0).mean == pytest.approx(2.4**0.63 * 2**1.16)
    assert find("compression-law").anchored is False


def test_wrong_signs_are_reported():
    points = [
        Point(value=2.0 - r, base=2.0 + 0.1 * i, ratio=r, ratio_kind="k", metric="loss", protocol="p", model=str(i))
        for i in range(2)
        for r in (0.1, 0.2, 0.3)
    ]
    fitted = fit("compression-law", points)
    assert any("requires β to be positive" in r for r in fitted.report().remarks)
    assert fitted.critical(1.05).status == "not_identified"


def drawn(metric: str, n: int = 2000) -> list[tuple[float, float, float, float, float, float]]:
    """α, β, γ, L0, r, D at random: of an accuracy (β, γ < 0) or of a loss (β, γ > 0)."""
    generator = np.random.default_rng(20250404)
    sign = -1.0 if metric == "extrinsic" else 1.0
    found: list[tuple[float, float, float, float, float, float]] = []
    for _ in range(n):
        alpha = generator.uniform(-0.7, 1.7)
        beta, gamma = sign * generator.uniform(0.05, 2.5), sign * generator.uniform(0.02, 2.0)
        base = generator.uniform(0.2, 0.95) if metric == "extrinsic" else generator.uniform(1.2, 4.0)
        tokens = 0.0 if generator.uniform() < 0.1 else float(np.exp(generator.uniform(-5, 20)))
        found.append((alpha, beta, gamma, base, generator.uniform(0.001, 0.999), tokens))
    return found


@pytest.mark.parametrize("metric", ["extrinsic", "intrinsic"])
def test_theorem_31_is_an_equivalence_for_any_parameters(metric: str):
    """L within σ of L0^α if and only if 1/(D + 1) ≤ (σ (1 + r)^(-β))^(1/γ) - 1, of accuracies and (D.4) of losses."""
    generator = np.random.default_rng(31)
    sides = {True: 0, False: 0}
    for alpha, beta, gamma, base, ratio, tokens in drawn(metric):
        # Near the value itself, so that both sides of the theorem occur.
        share = kept((alpha, beta, gamma), base, ratio, tokens)
        sigma = share * math.exp(generator.uniform(-0.3, 0.3))
        if not (0 < sigma < 1 if metric == "extrinsic" else sigma > 1) or math.isclose(share, sigma, rel_tol=1e-9):
            continue
        within = share >= sigma if metric == "extrinsic" else share <= sigma
        room = (sigma * (1 + ratio) ** -beta) ** (1 / gamma) - 1
        assert within == (1 / (tokens + 1) <= room), (alpha, beta, gamma, ratio, tokens, sigma)
        # And `tokens_needed` is the least such D.
        assert within == (tokens >= CompressionLaw.tokens_needed(beta, gamma, ratio, sigma))
        sides[within] += 1
    assert min(sides.values()) > 200


@pytest.mark.parametrize("metric", ["extrinsic", "intrinsic"])
def test_corollary_32_for_any_parameters(metric: str):
    """Up to 2^β every ratio can be recovered with some D; beyond, exactly those below σ^(1/β) - 1."""
    generator = np.random.default_rng(32)
    seen = {"always": 0, "below": 0, "beyond": 0}
    for _, beta, gamma, _, ratio, _ in drawn(metric):
        easy = 2**beta
        sigma = generator.uniform(0.001, 0.999) if metric == "extrinsic" else 1 + generator.uniform(0.001, 4)
        critical = CompressionLaw.critical_ratio(beta, sigma)
        recoverable = math.isfinite(CompressionLaw.tokens_needed(beta, gamma, ratio, sigma))
        if sigma < easy if metric == "extrinsic" else sigma > easy:
            assert critical > 1
            assert recoverable
            seen["always"] += 1
        else:
            assert 0 < critical <= 1
            assert recoverable == (ratio < critical)
            seen["below" if recoverable else "beyond"] += 1
    assert min(seen.values()) > 100
