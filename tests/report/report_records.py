"""Records with plausible curves for the report's tests: odds laws for cuts, powers of tokens for recovery."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from mariotte.store.record import Failure, Record, digest

MODELS = {
    "testbed/qwen2-345k": (345_000, 1.62, 0.81, "qwen2"),
    "testbed/qwen2-1m": (1_040_000, 1.318, 0.98, "qwen2"),
    "testbed/llama-1440k": (1_440_000, 1.347, 0.97, "llama"),
}
METHODS = {
    # method: family, unit, share of parameters that amount 1 takes, zeroes, damage at odds 1, exponent
    "magnitude": ("unstructured", "weights", 0.95, True, 0.42, 2.3),
    "ffn": ("width", "neurons", 0.62, False, 1.1, 1.25),
    "slicegpt": ("slice", "hidden", 0.97, False, 1.6, 1.5),
    "blocks": ("depth", "blocks", 0.9, False, 2.3, 1.2),
}
AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ENVIRONMENT = {
    "mariotte": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "python": "3.11.9",
    "device": "cpu",
    "threads": 1,
    "dtype": "float32",
}
LOSS = "loss:testbed/all(block=64)"
FACTS = "knowledge:testbed(facts=512)"


def damage(method: str, removed: float) -> float:
    *_, level, exponent = METHODS[method]
    raw = level * (removed / (1 - removed)) ** exponent
    return raw / (1 + raw / 5.0)


def known(base: float, harm: float) -> float:
    return max(base * math.exp(-1.6 * harm**1.1), 1 / 64)


def record(
    model: str,
    chain: str,
    measure: str,
    metrics: dict[str, float],
    base: dict[str, float],
    *,
    seed: int = 0,
    method: str | None = None,
    amount: float | None = None,
    removed: float = 0.0,
    details: dict[str, Any] | None = None,
    **others: Any,
) -> Record:
    n_params, _, _, model_type = MODELS.get(model, (1_000_000, 1.3, 0.9, "qwen2"))
    family, unit, zeroes = (
        (METHODS[method][0], METHODS[method][1], METHODS[method][3]) if method in METHODS else (None, None, False)
    )
    left = n_params if zeroes else round(n_params * (1 - removed))
    protocol = {
        "corpus": digest("testbed/all"),
        "split": "test",
        "tokenizer": digest(model_type),
        "block": 64,
        "stride": 64,
        "first_token": "not scored",
        "dtype": "float32",
    }
    return Record(
        id=digest([model, chain, measure, seed]),
        experiment=digest([model, chain, seed]),
        study="quickstart",
        model=model,
        model_type=model_type,
        model_hash=digest(model),
        chain=chain,
        seed=seed,
        measure=measure,
        metrics=metrics,
        base=base,
        protocol=protocol
        if measure.startswith("loss")
        else {"facts": digest("facts"), "split": "test", "patterns": "seen"},
        n_params=left,
        n_params_non_embedding=round(left * 0.9),
        base_params=n_params,
        n_bytes=2 * left,
        flops_per_token=2.0 * left,
        method=method,
        family=family,
        unit=unit,
        amount=amount,
        obtained=amount,
        ratio=0.0 if zeroes else removed,
        sparsity=amount or 0.0 if zeroes else 0.0,
        zeroed=removed if zeroes else 0.0,
        details=details or {},
        cost={"load_s": 0.21, "prepare_s": 0.8, "apply_s": 0.34, "measure_s": 1.9, "peak_bytes": 2.1e8},
        environment=ENVIRONMENT,
        created="2026-03-01T10:00:00Z",
        **others,
    )


def both(
    model: str,
    chain: str,
    removed: float,
    *,
    method: str | None,
    amount: float | None,
    seed: int,
    harm: float,
    facts: float,
    **others: Any,
) -> list[Record]:
    _, base_loss, base_known, _ = MODELS[model]
    loss = base_loss + harm
    common: dict[str, Any] = {"seed": seed, "method": method, "amount": amount, "removed": removed, **others}
    relations = {
        name: {"top1": min(1.0, facts * scale)}
        for name, scale in {
            "birthplace": 0.97,
            "profession": 1.0,
            "employer": 0.93,
            "language": 1.02,
            "instrument": 1.03,
        }.items()
    }
    return [
        record(
            model,
            chain,
            LOSS,
            {"loss": loss, "bits_per_byte": loss / 2.2},
            {"loss": base_loss, "bits_per_byte": base_loss / 2.2},
            **common,
        ),
        record(
            model,
            chain,
            FACTS,
            {
                "top1": facts,
                "top5": min(1.0, facts + 0.03),
                "mrr": min(1.0, facts + 0.01),
                "heldout_top1": facts * 0.97,
            },
            {
                "top1": base_known,
                "top5": min(1.0, base_known + 0.02),
                "mrr": base_known,
                "heldout_top1": base_known * 0.98,
            },
            details={"relations": relations, "facts_lost": ["person 3 · employer"]},
            **common,
        ),
    ]


def make(*, models: tuple[str, ...] = tuple(MODELS), seeds: int = 3, recovery: bool = True) -> list[Record]:
    """A study of four methods at seven amounts, with LoRA recovery of one random cut."""
    noise = random.Random(7)
    found: list[Record] = []
    for model in models:
        base_known = MODELS[model][2]
        found += both(model, "dense", 0.0, method=None, amount=None, seed=0, harm=0.0, facts=base_known)
        for method, (_, _, reach, _, _, _) in METHODS.items():
            for amount in AMOUNTS:
                for seed in range(seeds):
                    removed = amount * reach
                    harm = damage(method, removed) * math.exp(noise.gauss(0, 0.06))
                    found += both(
                        model,
                        f"{method}@{amount}",
                        removed,
                        method=method,
                        amount=amount,
                        seed=seed,
                        harm=harm,
                        facts=known(base_known, harm),
                    )
        if not recovery:
            continue
        for method in ("ffn", "slicegpt"):
            removed = 0.3 * METHODS[method][2]
            harm = damage(method, removed)
            for tokens in (4_000, 16_000, 64_000, 256_000):
                left = harm * (0.08 + 0.92 * (1 + tokens / 4_000) ** -0.7)
                found += both(
                    model,
                    f"{method}@0.3 | lora@{tokens // 1000}k",
                    removed,
                    method=method,
                    amount=0.3,
                    seed=0,
                    harm=left,
                    facts=known(base_known, left * 1.2),
                    recovery="lora",
                    recovery_tokens=tokens,
                    tokens_seen=tokens + tokens // 5,
                )
    return found


def failures() -> list[Failure]:
    return [
        Failure(
            experiment=digest("failed"),
            study="quickstart",
            model="testbed/qwen2-1m",
            chain="slicegpt@0.95",
            seed=0,
            stage="apply slicegpt@0.95",
            error="SliceGPT cannot cut 128 to 6: widths must be multiples of 8; nearest is 8",
            traceback="Traceback ...",
            created="2026-03-01T10:05:00Z",
        )
    ]


def runs() -> list[dict[str, Any]]:
    return [{"study": "quickstart", "experiments": 93, "loads": 3, "preparations": 12, "trunks": 6, "seconds": 412.0}]


LADDER = {
    "testbed/qwen2-46k": (46_000, "qwen2"),
    "testbed/qwen2-113k": (113_000, "qwen2"),
    "testbed/llama-146k": (146_000, "llama"),
    "testbed/qwen2-345k": (345_000, "qwen2"),
    "testbed/llama-483k": (483_000, "llama"),
    "testbed/qwen2-1m": (1_040_000, "qwen2"),
    "testbed/llama-1m": (1_040_000, "llama"),
    "testbed/qwen2-2m": (2_010_000, "qwen2"),
}
CORPORA = ("testbed/encyclopedia", "testbed/instructions", "testbed/news")
CHANCES = {"agreement": 0.5, "events": 0.25, "facts": 0.25, "paraphrase": 0.25, "places": 0.25, "reverse": 0.25}
PRUNINGS = ("sparsegpt", "wanda", "magnitude", "slicegpt", "slice", "ffn", "prunenet-random", "shortgpt")


@dataclasses.dataclass(frozen=True)
class _Rung:
    model: str
    n_params: int
    model_type: str
    dense: float


def laws_study(*, pruning: bool = False) -> list[Record]:
    """Records of the size of ``studies/testbed/compression-laws.toml``, or of ``pruning-laws.toml``."""
    noise = random.Random(11)
    found: list[Record] = []
    for place, (model, (n_params, model_type)) in enumerate(LADDER.items()):
        rung = _Rung(model, n_params, model_type, 1.9 - 0.09 * place)
        found += _laws_state(rung, "dense", 0.0, 0.0, noise, pruning=pruning)
        methods = PRUNINGS if pruning else ("prunenet-random", *(("slicegpt",) if model_type == "llama" else ()))
        for order, method in enumerate(methods):
            for tenths in range(1, 10, 1 if pruning else 2):
                amount = tenths / 10
                harm = (0.6 + 0.2 * order) * (amount / (1.05 - amount)) ** 1.3
                harm /= 1 + harm / 5
                found += _laws_state(rung, f"{method}@{amount}", amount, harm, noise, pruning=pruning)
                for corpus in () if pruning else CORPORA:
                    for tokens in (4_000, 16_000, 64_000):
                        chain = f"{method}@{amount} | lora@{tokens // 1000}k(corpus={corpus})"
                        left = harm * (1 + tokens / 4_000) ** -0.4
                        found += _laws_state(rung, chain, amount, left, noise, trained=corpus, tokens=tokens)
    return found


def _laws_state(
    rung: _Rung,
    chain: str,
    amount: float,
    harm: float,
    noise: random.Random,
    *,
    trained: str = "",
    tokens: int = 0,
    pruning: bool = False,
) -> list[Record]:
    found: list[Record] = []
    method = chain.partition("@")[0] if amount else None
    cut: dict[str, Any] = {"method": method, "amount": amount or None, "removed": 0.6 * amount}
    if trained:
        cut |= {"recovery": "lora", "recovery_tokens": tokens}
    for corpus in CORPORA:
        far = 1.0 if corpus == trained or not trained else 1.5
        value = rung.dense + harm * far * math.exp(noise.gauss(0, 0.05))
        metrics = {"loss": value, "bits_per_byte": value / 2.5, "loss_se": 0.01}
        base = {"loss": rung.dense, "bits_per_byte": rung.dense / 2.5, "loss_se": 0.01}
        found.append(_laws_record(rung, chain, f"loss:{corpus}(rows=160)", metrics, base, {"corpus": corpus}, {}, cut))
    right = {task: chance + (0.98 - chance) * math.exp(-harm) for task, chance in CHANCES.items()}
    best = dict.fromkeys(CHANCES, 0.98)
    for scores in (right, best):
        scores |= {"accuracy": sum(scores.values()) / len(scores)}
        scores |= {f"{name}_se": 0.02 for name in list(scores)}
    protocol = {"tasks": {task: {"chance": chance, "n": 200} for task, chance in CHANCES.items()}}
    details = {task: {"chance": chance, "correct": "10" * 100, "n": 200} for task, chance in CHANCES.items()}
    found.append(_laws_record(rung, chain, "tasks:testbed(items=200)", right, best, protocol, details, cut))
    if pruning:
        known_ = 0.9 * math.exp(-harm)
        metrics, base = {"top1": known_, "heldout_top1": 0.95 * known_}, {"top1": 0.9, "heldout_top1": 0.85}
        found.append(_laws_record(rung, chain, FACTS, metrics, base, {"facts": "512"}, {}, cut))
    elif not trained:
        speeds: dict[str, float] = {"speedup_prefill": 1 + 0.5 * amount, "speedup_decode": 1 + 0.2 * amount}
        said = {
            name.removeprefix("speedup_"): {
                "interval": [value - 0.06, value + 0.09],
                "verdict": "faster" if amount > 0.4 else "inside the noise",
            }
            for name, value in speeds.items()
        }
        errors = {f"{name}_se": 0.03 for name in speeds} if amount else {}
        measure, protocol = "speed:random(batch=16, clock=cpu, new=4)", {"batch": 16, "repeatable": False}
        one = dict.fromkeys(speeds, 1.0)
        found.append(_laws_record(rung, chain, measure, speeds | errors, one, protocol, said if amount else {}, cut))
    return found


def _laws_record(
    rung: _Rung,
    chain: str,
    measure: str,
    metrics: dict[str, float],
    base: dict[str, float],
    protocol: dict[str, Any],
    details: dict[str, Any],
    cut: dict[str, Any],
) -> Record:
    return dataclasses.replace(
        record(rung.model, chain, measure, metrics, base, details=details, **cut),
        study="laws",
        model_type=rung.model_type,
        base_params=rung.n_params,
        protocol={**protocol, "tokenizer_sha256": digest(rung.model_type), "split": "test", "dtype": "float32"},
    )
