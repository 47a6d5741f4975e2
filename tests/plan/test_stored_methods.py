"""Plans with a store's own methods: those of which the package brings no records, and several cuts together."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mariotte.chain import parse
from mariotte.cli._planned import print_options
from mariotte.errors import MariotteError, UnknownNameError
from mariotte.locate import config_of
from mariotte.plan import planner, read_budget
from mariotte.plan.candidates import CUTS, together
from mariotte.plan.pool import Entry, parted, shipped, without
from mariotte.plan.quality import ADDS
from mariotte.plan.ranking import Planner
from mariotte.plan.speed import Calibration, decode_seconds
from mariotte.shapes import RECOVERIES, Sized, cache_bytes_per_token, foretold, memory_bytes

MODEL = "testbed/qwen2-1m"
OTHERS = ("testbed/qwen2-345k", "testbed/llama-146k", "testbed/llama-483k", "testbed/llama-1m")
HARM = {
    "heads": 2.0,
    "flap": 1.2,
    "flap(uniform=true)": 1.5,
    "llm-pruner": 1.6,
    "modegpt": 0.6,
    "svd-llm": 1.0,
    "ffn": 0.5,
    "shortgpt": 3.0,
}
AMOUNTS = (0.1, 0.2, 0.35, 0.5, 0.7)


def damage_of(method: str, amount: float, of: str) -> float:
    fragile = 1 + 0.1 * (len(of) % 3)
    return HARM[method] * fragile * (amount / (1 - amount)) ** 1.6 / 4


def entry(model: Sized, chain: str, damage: float) -> Entry:
    left = foretold(model, parse(chain))
    return Entry(
        model=model.name,
        family=str(model.config["model_type"]),
        params=float(model.counts.n_params),
        chain=chain,
        obtained=left.obtained,
        n_params=left.n_params,
        n_bytes=left.n_bytes,
        metric="loss",
        measure="loss:made",
        protocol="loss:made#1",
        base=1.5,
        value=1.5 + damage,
    )


def sized(name: str) -> Sized:
    return Sized.of(name, config_of(name))


def linked(method: str, amount: float) -> str:
    name, bracket, rest = method.partition("(")
    return f"{name}@{amount:g}{bracket}{rest}"


def stored(methods: Sequence[str] = tuple(HARM), models: Sequence[str] = OTHERS) -> list[Entry]:
    """Records of methods on other models, as a user may have them."""
    found: list[Entry] = []
    for name in models:
        model = sized(name)
        for method in methods:
            for amount in AMOUNTS:
                obtained = foretold(model, parse(linked(method, amount))).obtained
                if obtained:
                    found.append(entry(model, linked(method, amount), damage_of(method, obtained, name)))
    return found


def planned(entries: Sequence[Entry], methods: Sequence[str] | None = None, **budget: object) -> Planner:
    asked = read_budget(**(budget or {"max_loss": "+10%"}))  # type: ignore[arg-type]
    return planner(MODEL, asked, pool=entries, step=0.1, methods=methods)


def test_every_method_that_a_store_knows_is_considered() -> None:
    found = planned(stored())
    assert {c.asked.parts.cut for c in found.candidates} == set(HARM)
    options = {option.chain: option for option in found.plan().options}
    model = sized(MODEL)
    for candidate in found.candidates:
        left, option = foretold(model, parse(candidate.chain)), options[candidate.chain]
        assert candidate.left == left
        assert (option.n_params, option.slack, option.decided) == (left.n_params, left.slack, left.decided)
    plain = [c for c in found.candidates if not c.left.decided]
    assert {c.asked.parts.cut for c in plain} == set(HARM) - {"flap", "modegpt"}
    assert {c.asked.parts.cut for c in found.candidates if c.left.slack} == {"flap"}


def test_nothing_is_considered_of_which_nothing_is_known() -> None:
    for budget in ({"max_loss": "+5%"}, {"max_loss": "+10%", "bytes": "60%"}):
        found = planner(MODEL, read_budget(**budget), pool=without(shipped(), MODEL), step=0.2)  # type: ignore[arg-type]
        assert {c.asked.parts.cut for c in found.candidates} - {""} == set(CUTS)
        assert {c.asked.parts.quantizer for c in found.candidates} <= {"", "rtn@4", "rtn@3"}
        assert not found.untold


def test_what_text_decides_is_said_and_the_most_is_held_against_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(stored(["flap"]))
    winner = found.plan().winner
    assert winner is not None
    print_options(found.plan(), 1)
    off = winner.slack / found.model.counts.n_params
    assert f"{winner.saving:.1%} ± {off:.1%}" in capsys.readouterr().out
    said = " ".join(found.plan().unknowns)
    assert f"text decides which groups flap removes: the parameters of {winner.chain} are foretold to within" in said
    asked = planned(stored(["flap"]), max_loss="+100%", bytes="70%")
    for option in asked.options():
        most = option.n_bytes + 2 * option.slack
        assert option.slack > 0
        assert bool(option.misses) == (most > 0.7 * asked.model.counts.n_bytes), option
    # Whichever heads go, the cache is no larger than that of all.
    model = sized(MODEL)
    left = foretold(model, parse("flap@0.5"))
    cache = 4096 * cache_bytes_per_token(model.shape, 2)
    assert memory_bytes(model, left, 4096, 1) > left.n_bytes + cache


def test_methods_that_cannot_work_on_a_model_are_named_with_the_reason() -> None:
    mixture = Sized.of("mix", {**MIXTURE, "num_hidden_layers": 3})
    entries = [*stored(["ffn"]), entry(mixture, "experts@0.5", 0.2)]
    why = (
        f"experts cannot be foretold on {MODEL}: it needs a mixture of experts, and qwen2 has one MLP a block: take ffn"
    )
    assert why in planned(entries).plan().unknowns
    with pytest.raises(MariotteError, match=r"^experts cannot be foretold on .* it needs a mixture of experts"):
        planned(entries, ["experts"])
    with pytest.raises(UnknownNameError, match="svd-llm"):
        planned(entries, ["ffn | svd-llm"])


MIXTURE = {
    "model_type": "mixtral",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_mixtures_are_planned_with_fewer_and_narrower_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    entries: list[Entry] = []
    for layers in (3, 5, 6):
        model = Sized.of(f"mix-{layers}", {**MIXTURE, "num_hidden_layers": layers})
        for amount in (0.125, 0.25, 0.5, 0.75):
            for method, harm in (("experts", 0.3), ("expert-ffn", 0.5)):
                entries.append(entry(model, f"{method}@{amount}", harm * (amount / (1 - amount)) ** 1.5))
    found = planner(str(tmp_path), read_budget(max_loss="+60%", memory="85%", sure=0.6), pool=entries, step=0.125)
    assert {c.asked.parts.cut for c in found.candidates} == {"experts", "expert-ffn"}
    lefts = {c.chain: c.left for c in found.candidates}
    dense = found.model.counts
    # A token takes as many experts as before: they are fewer, and its work but for the choice among them is the same.
    half = lefts["experts@0.5"]
    assert (half.shape.experts, half.shape.active) == (4, 2)
    assert dense.flops_per_token - half.flops_per_token == 2 * 4 * 64 * 4
    assert lefts["expert-ffn@0.5"].flops_per_token < half.flops_per_token
    winner = found.plan().winner
    assert winner is not None
    assert winner.saving > 0.1


def test_quantizers_that_a_store_knows_are_considered_with_their_own_bytes() -> None:
    entries = stored(["ffn"])
    for name in OTHERS:
        entries += [
            entry(sized(name), chain, damage)
            for chain, damage in (("fp8", 0.002), ("gptq@3", 0.2), ("int8", 0.001), ("rtn@5(group=4)", 0.01))
        ]
    found = planned(entries, max_loss="+10%", bytes="60%")
    known = {c.asked.parts.quantizer for c in found.candidates}
    assert known == {"", "fp8", "gptq@3", "int8", "rtn@5(group=4)"}
    model = sized(MODEL)
    for candidate in found.candidates:
        assert candidate.left.n_bytes == foretold(model, parse(candidate.chain)).n_bytes
    said = " ".join(found.plan().unknowns)
    assert "bytes and memory of gptq@3 and int8 and rtn@5(group=4) are simulated" in said
    assert found.plan().winner is not None


def test_groups_that_do_not_fit_a_model_are_named() -> None:
    entries = [*stored(["ffn"]), entry(sized(OTHERS[0]), "int8", 0.01)]
    wide = Sized.of("wide", {**MIXTURE, "model_type": "llama", "hidden_size": 128, "head_dim": 32})
    wide = replace(wide, shape=replace(wide.shape, ffn=256))
    entries.append(entry(wide, "int4", 0.01))
    found = planned(entries, max_loss="+10%", bytes="60%")
    assert "int4" in found.qualities[0].quantizers
    (why,) = found.untold
    assert why.startswith(f"int4 cannot be foretold on {MODEL}: it needs input widths that group=128 divides")


PATH = ("shortgpt", "heads", "ffn")


def combined(factor: float = 1.0) -> list[Entry]:
    """The same with chains of all three cuts, which do `factor` times the sum of what each does."""
    entries = stored(PATH)
    for name in OTHERS:
        known = {e.chain: e.value - e.base for e in entries if e.model == name}
        cuts = [f"{method}@{amount:g}" for method, amount in zip(PATH, (0.2, 0.35, 0.5), strict=True)]
        entries.append(entry(sized(name), " | ".join(cuts), factor * sum(known.get(cut, 0.0) for cut in cuts)))
    return entries


def test_cuts_are_combined_where_that_was_measured_or_is_asked_for() -> None:
    assert not any(c.asked.parts.combined for c in planned(stored(PATH)).candidates)
    for found in (planned(combined()), planned(stored(PATH), ["shortgpt | heads | ffn"])):
        several = [c for c in found.candidates if c.asked.parts.combined]
        assert len(several) > 10
        model = sized(MODEL)
        for candidate in several:
            assert candidate.left == foretold(model, parse(candidate.chain))
            assert [link.name for link in parse(candidate.chain).links] == list(candidate.asked.parts.cuts)
            assert candidate.asked.amounts == candidate.left.shares
        # One path: each chain takes more than the one before, and its smallest amounts.
        sizes = [c.left.n_params for c in several if c.asked.parts.cuts == PATH]
        assert sizes == sorted(sizes, reverse=True)


def test_together_they_do_what_they_do_alone_times_what_other_models_tell() -> None:
    adds, twice = planned(combined(1.0)), planned(combined(2.0))
    assert adds.qualities[0].together.mean == pytest.approx(ADDS.mean / 2)  # four measurements beside four of before
    assert twice.qualities[0].together.mean == pytest.approx((math.log(2) + ADDS.mean) / 2)
    (quality,) = adds.qualities
    chain = next(c for c in adds.candidates if c.asked.parts.cuts == PATH)
    alone = sum(quality.middle(cut, amount) for cut, amount in chain.asked.places)
    (one,) = quality.forecasts([chain.asked])
    assert one.lo < one.mean < one.hi
    assert one.mean - one.base == pytest.approx(alone * math.exp(quality.together.mean), rel=0.35)
    (other,) = twice.qualities[0].forecasts([chain.asked])
    assert other.mean > one.mean
    said = planned(combined(), ["shortgpt | heads | ffn"], max_loss="+100%").plan()
    assert said.winner is not None
    assert any("do together is not known of this model" in sentence for sentence in said.unknowns)


def test_more_of_a_combination_never_does_less_damage() -> None:
    found = planned(combined())
    (quality,) = found.qualities
    several = [c for c in found.candidates if c.asked.parts.cuts == PATH]
    forecasts = quality.forecasts([c.asked for c in several])
    for name in ("lo", "mean", "hi"):
        values = [getattr(f, name) for f in forecasts]
        assert values == sorted(values)


def test_a_combination_that_was_measured_is_known_and_may_be_chosen() -> None:
    own = "shortgpt@0.15 | heads@0.25 | ffn@0.62"
    entries = [*combined(), entry(sized(MODEL), own, 0.01)]
    found = planned(entries)
    options = {option.chain: option for option in found.plan(experiments=0).options}
    assert options[own].quality[0].measured
    assert options[own].quality[0].mean == 1.51
    assert found.plan(experiments=0).winner == options[own]
    # Its first cut is that of no other chain: nothing is said of `shortgpt` alone.
    assert not any(option.quality[0].measured for chain, option in options.items() if chain != own)
    assert not found.qualities[0].own
    # What tells is one cut at a time.
    assert all(" | " not in one.chain for one in found.plan().experiments)


def test_recovery_and_quantizer_follow_several_cuts() -> None:
    entries = combined()
    for name in OTHERS:
        entries.append(entry(sized(name), "int8", 0.001))
        known = {e.chain: e for e in entries if e.model == name}
        for amount in AMOUNTS:
            if (cut := known.get(f"ffn@{amount:g}")) is not None:
                entries.append(entry(sized(name), f"ffn@{amount:g} | lora@64k", 0.3 * (cut.value - 1.5)))
    found = planned(entries, max_loss="+10%", bytes="90%", recovery_tokens="64k")
    chains = [c for c in found.candidates if c.asked.parts.cuts == PATH]
    assert {(c.asked.parts.recovery, c.asked.parts.quantizer) for c in chains} == {
        (recovery, quantizer) for recovery in ("", "lora@64k") for quantizer in ("", "int8")
    }
    whole = next(c for c in chains if c.asked.parts.recovery and c.asked.parts.quantizer)
    names = [link.name for link in parse(whole.chain).links]
    assert names == [*PATH, "lora", "int8"]
    assert names[3] in RECOVERIES
    assert whole.tokens == 64_000
    (quality,) = found.qualities
    plain = next(c for c in chains if c.chain == " | ".join(str(parse(whole.chain)).split(" | ")[:3]))
    cut, treated = quality.forecasts([plain.asked, whole.asked])
    assert treated.mean < cut.mean  # the recovery takes more than the quantizer adds
    assert whole.left.n_bytes < plain.left.n_bytes


def test_a_path_takes_the_cut_that_does_least_for_what_it_removes() -> None:
    model = sized(MODEL)
    path = together(model, ("heads", "ffn"), lambda cut, amount: amount if cut == "heads" else 0.0, step=0.3)
    assert path
    assert all(c.chain.endswith(" | ffn@0.9") for c in path)
    assert [c.asked.amounts[0] for c in path] == sorted({c.asked.amounts[0] for c in path})
    other = together(model, ("heads", "ffn"), lambda cut, amount: amount if cut == "ffn" else 0.0, step=0.3)
    assert other[-1].chain == path[-1].chain
    assert len({parse(c.chain).links[0].amount for c in other}) == 1
    assert all(parted(c.chain) == c.asked.parts for c in (*path, *other))


def test_heads_and_products_change_what_decoding_takes() -> None:
    model = sized(MODEL)
    calibration = Calibration(
        machine="m", device="cpu", dtype="float32", threads=1, flops_per_s=1e12, bytes_per_s=1e15, operation_s=1e-6,
        measured="", block_s=1e-4, step_s=1e-4,
    )  # fmt: skip
    whole, fewer = foretold(model, parse("dense")), foretold(model, parse("heads@0.5(by=groups)"))
    # By queries the key-value heads stay, and with them the cache.
    queries = foretold(model, parse("heads@0.5(by=queries)"))
    assert cache_bytes_per_token(fewer.shape, 2) * 2 == cache_bytes_per_token(whole.shape, 2)
    assert cache_bytes_per_token(queries.shape, 2) == cache_bytes_per_token(whole.shape, 2)
    assert memory_bytes(model, fewer, 65536, 8) < 0.6 * memory_bytes(model, whole, 65536, 8)
    products = foretold(model, parse("svd-llm@0.5"))
    assert products.shape.ranks is not None
    calls = sum(rank > 0 for ranks in products.shape.ranks for rank in ranks)
    assert calls == 7 * model.shape.layers
    took = [decode_seconds(model, left, 1, 1, calibration) for left in (whole, products)]
    assert took[1] - took[0] == pytest.approx(1e-6 * calls, rel=0.05)  # arithmetic is nothing here, calls are all
    assert products.flops_per_token < whole.flops_per_token


def test_shapes_tell_all_of_it_without_torch() -> None:
    code = (
        "import sys\n"
        "from mariotte.chain import parse\n"
        "from mariotte.locate import config_of\n"
        "from mariotte.shapes import CUTS, Sized, foretold, left_by\n"
        f"model = Sized.of({MODEL!r}, config_of({MODEL!r}))\n"
        "told = [name for name in CUTS if left_by(model, parse(f'{name}@0.5')) is not None]\n"
        "foretold(model, parse('shortgpt@0.2 | heads@0.5 | ffn@0.3 | slice@0.25 | lora@64k | int8'))\n"
        "print(len(told), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "13 []"
