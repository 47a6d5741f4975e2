"""Entries are data: every path is looked up on a tiny model of the family, every size compared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mariotte import accounting, architectures
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.scope import oriented
from mariotte.compress.surgery import derive
from mariotte.errors import ModelError, UnknownNameError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model, Stacked
from mariotte.models.step import Context, Step, prepare_once
from mariotte.testing.methods import all_steps
from mariotte.testing.tiny import random_tokens, tiny, to_ask, weights_hash

FAMILIES = sorted(architectures.FAMILIES)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("falcon", {"bias": True, "multi_query": False}),
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False, "alibi": True}),
    ("gpt_oss", {"attention_bias": False}),
    ("gpt2", {"n_inner": None}),
    ("opt", {"word_embed_proj_dim": 8}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    ("opt", {"enable_bias": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("roberta", {"type_vocab_size": 1}),
    ("albert", {"embedding_size": 8}),
    ("albert", {"num_hidden_groups": 3}),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("t5", {"num_layers": 1}),
    ("bart", {"encoder_layers": 1, "encoder_ffn_dim": 24, "encoder_attention_heads": 1}),
]

TIES = {family: [True] if family == "t5" else [True, False] for family in FAMILIES}
"""transformers ties the head of every T5 that it makes; one with a head of its own comes from its weights."""


def weight(matrix: nn.Module) -> torch.Tensor:
    """A matrix as outputs x inputs."""
    found = matrix.weight
    assert isinstance(found, torch.Tensor)
    return found.T if isinstance(matrix, Conv1D) else found


def named(variant: object) -> str:
    return variant if isinstance(variant, str) else ",".join(variant) if isinstance(variant, dict) else str(variant)


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=named)
def test_every_path_exists_and_widths_chain(family: str, settings: dict[str, Any]) -> None:
    model = tiny(family, hidden=40, heads=5, kv_heads=1, head_dim=8, ffn=56, layers=3, **settings)
    s, entry = model.shape, model.entry
    assert model.embeddings.weight.shape == (s.vocab, s.embedding_size)
    assert model.head.weight.shape == (s.vocab, s.embedding_size)
    assert s.layers == 3
    assert len(model.blocks) == s.blocks + (0 if s.encoder is None else s.encoder.blocks)
    shapes = [s] * s.blocks if s.encoder is None else [s.encoder] * s.encoder.blocks + [s] * s.blocks
    for block, shape in zip(model.blocks, shapes, strict=True):
        query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if block.entry.fused:
            assert weight(block.attention[0]).shape == (query + 2 * keys, shape.hidden)
            with pytest.raises(ModelError, match="holds query, key and value in one matrix"):
                _ = block.query
            rows = block.entry.rows(shape)
            assert [len(each) for each in rows] == [query, keys, keys]
            assert sorted(itertools.chain(*rows)) == list(range(query + 2 * keys))
        else:
            assert block.query.weight.shape == (query, shape.hidden)
            assert block.key.weight.shape == block.value.weight.shape == (keys, shape.hidden)
        assert weight(block.output).shape == (shape.hidden, query)
        *ins, down = block.ffn
        ups = shape.ffn * (1 + shape.gated) * max(shape.experts, 1)
        assert sum(len(oriented(matrix)) for matrix in ins) == ups
        assert {oriented(matrix).shape[1] for matrix in ins} == {shape.hidden}
        assert oriented(down).shape == (shape.hidden * max(shape.experts, 1), shape.ffn)
        if shape.experts or block.entry.fused_mlp:
            with pytest.raises(ModelError, match="ask for the block's ffn"):
                _ = block.up
        else:
            assert (block.gate is not None) == shape.gated
            assert (weight(block.up).shape, weight(block.down).shape) == (oriented(ins[-1]).shape, oriented(down).shape)
        if shape.experts:
            router = block.module.get_submodule(block.entry.router)
            assert router.weight.shape == (shape.experts, shape.hidden)
            assert 0 < shape.active < shape.experts
        within = dict(block.module.named_modules())
        norms = {block.entry.attention_norm, block.entry.mlp_norm, block.entry.cross_norm, *block.entry.outer_norms}
        assert len(norms - {""}) == shape.norms
        assert all(within[path].weight.shape == (shape.hidden,) for path in norms - {""})
        wide = {None: [], "each": [(shape.head_dim,)] * 2, "all": [(query,), (keys,)]}[shape.head_norms]
        assert [within[path].weight.shape for path in block.entry.head_norms] == wide
        named_norms = {path for path in within if "norm" in path.lower() or path.startswith("ln_")}
        assert block.entry.irregular or named_norms == norms - {""} | {*block.entry.head_norms}
        assert (getattr(block.mlp_norm, "bias", None) is not None) == shape.norm_bias
        assert (block.attention[0].bias is not None) == shape.attention_bias
        assert (block.output.bias is not None) == shape.output_bias
        assert {matrix.bias is not None for matrix in block.ffn} == {shape.mlp_bias}
        if shape.cross:
            assert [weight(matrix).shape for matrix in block.attention[4:]] == [
                (query, shape.hidden),
                (keys, shape.hidden),
                (keys, shape.hidden),
                (shape.hidden, query),
            ]
            assert block.module.get_submodule(block.entry.cross_norm).weight.shape == (shape.hidden,)
    for stack in entry.stacks:
        assert not stack.final_norm or model.hf.get_submodule(stack.final_norm).weight.shape == (s.hidden,)
        assert not stack.embedding_norm or model.hf.get_submodule(stack.embedding_norm).weight.shape[0] <= s.hidden
        assert not stack.relative or model.hf.get_submodule(f"{stack.blocks}.0.{stack.relative}")
    for path, there in ((entry.map_in, s.map_in), (entry.map_out, s.map_out)):
        parent, _, name = path.rpartition(".")
        assert not path or (getattr(model.hf.get_submodule(parent), name) is not None) == there
    assert not entry.transform or model.hf.get_submodule(entry.transform).weight.shape == (s.embedding_size, s.hidden)
    assert not entry.head_norm or model.hf.get_submodule(entry.head_norm).weight.shape == (s.embedding_size,)
    assert all(model.hf.get_parameter(path).shape == (s.vocab,) for path in entry.head_biases)


@pytest.mark.parametrize(("family", "tied"), [(family, tied) for family in FAMILIES for tied in TIES[family]])
def test_the_head_ties_as_stated(family: str, tied: bool) -> None:
    model = tiny(family, tied=tied)
    assert (model.head.weight is model.embeddings.weight) == tied == model.shape.tied


@pytest.mark.parametrize(
    ("family", "settings", "tied"),
    [(family, settings, tied) for family, settings in VARIANTS for tied in TIES[family]],
    ids=named,
)
def test_accounting_equals_a_real_model(family: str, settings: dict[str, Any], tied: bool) -> None:
    model = tiny(family, tied=tied, hidden=24, heads=3, kv_heads=1, head_dim=16, ffn=40, layers=3, **settings)
    counts = accounting.count(model.config)
    assert counts.n_params == model.measured_params()
    of_blocks = [p.numel() for block in model.blocks for p in block.module.parameters()]
    norms = [model.hf.get_submodule(stack.final_norm) for stack in model.entry.stacks if stack.final_norm]
    assert counts.n_params_non_embedding == sum(of_blocks) + sum(p.numel() for n in norms for p in n.parameters())
    assert counts.n_bytes == 4 * counts.n_params
    assert counts.attention == sum(p.numel() for b in model.blocks for m in b.attention for p in m.parameters())
    routers = [b.module.get_submodule(b.entry.router) for b in model.blocks if b.entry.experts]
    of_mlps = [*routers, *(m for b in model.blocks for m in b.ffn)]
    assert counts.ffn == sum(p.numel() for m in of_mlps for p in m.parameters())
    assert counts.embeddings == counts.n_params - counts.n_params_non_embedding


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=named)
def test_flops_equal_torchs_own_count(family: str, settings: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(family, **settings)
    # One expert after another: torch does not count its products of many matrices at once.
    model.hf.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(torch.ones(1, 1, dtype=torch.long))
    # One token attends to itself alone: scores and weighted sum of a context of one.
    assert counter.get_total_flops() == pytest.approx(
        accounting.count(model.config, context=1).flops_per_token, rel=0.02
    )


def test_a_config_counts_as_it_is_published() -> None:
    """Configs leave out what their class takes for granted; parameters as the publishers state them."""
    bert = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    sizes = {"intermediate_size": 3072, "max_position_embeddings": 512, "vocab_size": 30522}
    # bert-base-uncased: 110M with the pooler, which masked language models go without.
    assert accounting.count({**bert, **sizes}).n_params == 109_514_298
    albert = {"model_type": "albert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    sizes = {"intermediate_size": 3072, "max_position_embeddings": 512, "vocab_size": 30000, "embedding_size": 128}
    assert round(accounting.count({**albert, **sizes}).n_params / 1e6) == 11  # albert-base: 12M with its pooler
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    assert accounting.count(gpt2).n_params == 124_439_808
    flan = {"model_type": "t5", "d_model": 768, "num_layers": 12, "num_heads": 12, "d_kv": 64, "d_ff": 2048}
    other = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert accounting.count({**flan, **other}).n_params == 247_577_856  # flan-t5-base


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=named)
def test_it_is_saved_and_loads_back(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family, tied=True, **settings)
    loaded = load(checkpoint.save(model, tmp_path / "saved"))
    tokens_BT = random_tokens(3, 9)
    with torch.no_grad():
        assert torch.allclose(loaded.logits(tokens_BT), model.logits(tokens_BT), atol=1e-4)
    assert loaded.shape == model.shape
    assert loaded.kind == model.kind
    assert (
        f"import AutoModelFor{ {'causal': 'CausalLM', 'masked': 'MaskedLM', 'seq2seq': 'Seq2SeqLM'}[model.kind] }"
        in (tmp_path / "saved/README.md").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_is_untied_stays_so(family: str, tmp_path: Path) -> None:
    tied = tiny(family, tied=True)
    own = torch.randn(tied.head.weight.shape, generator=torch.Generator().manual_seed(3))
    model = derive(tied, {f"{tied.entry.head}.weight": own}, untie=True)
    assert torch.equal(model.embeddings.weight, tied.embeddings.weight)
    assert torch.equal(model.head.weight, own)
    loaded = load(checkpoint.save(model, tmp_path / "saved"))
    for found in (model, loaded):
        assert not found.shape.tied
        assert found.counts.n_params == found.measured_params()
    tokens_BT = random_tokens(2, 8)
    with torch.no_grad():
        assert torch.allclose(loaded.logits(tokens_BT), model.logits(tokens_BT), atol=1e-4)


def test_a_t5_with_a_head_of_its_own_keeps_it(tmp_path: Path) -> None:
    """As Flan-T5: transformers reads another scale of the logits from the same key of its config."""
    tied = tiny("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    head = nn.Parameter(torch.randn(tied.head.weight.shape, generator=torch.Generator().manual_seed(3)))
    tied.hf.get_submodule(tied.entry.head).weight = head
    tied.hf.all_tied_weights_keys.pop("lm_head.weight")
    tied.hf.config.tie_word_embeddings = False
    tied.hf.save_pretrained(tmp_path / "flan")
    flan = load(tmp_path / "flan")
    assert torch.equal(flan.head.weight, head)
    assert not flan.shape.tied
    assert flan.counts.n_params == flan.measured_params()
    again = load(checkpoint.save(flan, tmp_path / "again"))
    tokens_BT = random_tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(again.logits(tokens_BT), tied.logits(tokens_BT))


def test_weights_for_which_a_model_has_no_use_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny("bert", tied=True)
    model.hf.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.weight": torch.ones(2, 32)}
    save_file({**weights, **extra}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(tmp_path).measured_params() == model.measured_params()
    save_file({**weights, "bert.other.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"holds weights that its config does not know, such as bert\.other"):
        load(tmp_path)


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=named)
def test_scopes_are_every_matrix_once(family: str, settings: dict[str, Any]) -> None:
    model = tiny(family, tied=True, **settings)
    both = {**model.paths("attention"), **model.paths("ffn")}
    assert set(both) == set(model.paths("all"))
    stacked = {path: matrix for path, matrix in both.items() if isinstance(matrix, Stacked)}
    assert all(model.hf.get_parameter(path) is matrix.weight for path, matrix in stacked.items())
    assert len(stacked) == (2 * len(model.blocks) if model.entry.experts else 0)
    assert all(model.hf.get_submodule(path) is both[path] for path in set(both) - set(stacked))
    in_blocks = {
        id(module)
        for block in model.blocks
        for module in block.module.modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    assert {id(matrix) for path, matrix in both.items() if path not in stacked} == in_blocks
    assert list(model.paths("head")) == [model.entry.head]
    everything = model.paths("embeddings", "all", "head")
    assert len({id(matrix.weight) for matrix in everything.values()}) == len(everything)
    tables = {id(m.weight) for m in model.hf.modules() if isinstance(m, nn.Embedding)}
    relative = {id(m.weight) for n, m in model.hf.named_modules() if n.endswith("relative_attention_bias")}
    assert {id(matrix.weight) for matrix in model.paths("embeddings").values()} == tables - relative
    with pytest.raises(ModelError, match="scopes are all, attention, ffn, embeddings, head, got mlp"):
        model.paths("mlp")


def cut(step: Step, model: Model, amount: float, folder: Path) -> Model:
    context = Context(dense=model, scratch=folder)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


@pytest.mark.parametrize("scope", ["all", "attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_works_on_every_family(family: str, scope: str, tmp_path: Path) -> None:
    model = tiny(family, tied=True)
    before = weights_hash(model)
    step = Magnitude(scope=scope)
    assert step.refuse(model) is None
    done = cut(step, model, 0.5, tmp_path / "a")
    assert weights_hash(model) == before
    in_scope = sum(matrix.weight.numel() for matrix in model.matrices(scope))
    # A block that layers share counts once.
    assert (done.done[-1].zeros, done.done[-1].in_scope) == (round(in_scope / 2), in_scope)
    assert done.zeros(scope) == round(in_scope / 2)
    kept = done.hf.state_dict()
    in_it = {id(matrix.weight) for matrix in done.matrices(scope)}
    for name, parameter in done.hf.named_parameters():
        if id(parameter) not in in_it:
            assert torch.equal(parameter, model.hf.get_parameter(name)), name
    # What is shared in a model is shared in what was made of it, and nothing with the model itself.
    theirs = {id(parameter) for parameter in model.hf.parameters()}
    assert not theirs & {id(p) for _, p in done.hf.named_parameters(remove_duplicate=False)}
    assert set(kept) == set(model.hf.state_dict())
    assert done.measured_params() == model.measured_params()
    loaded = load(checkpoint.save(done, tmp_path / "saved"))
    tokens_BT = random_tokens(2, 8)
    with torch.no_grad():
        assert torch.allclose(loaded.logits(tokens_BT), done.logits(tokens_BT), atol=1e-4)
        assert not torch.equal(done.logits(tokens_BT), model.logits(tokens_BT))


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_refuse_what_a_family_lacks_by_name(family: str) -> None:
    for step in all_steps():
        model = to_ask(family, step)
        reason = step.refuse(model)
        if reason is None:
            assert model.kind == "causal" or "causal" not in step.needs, f"{step.link(0.5)} on {family}"
            assert model.kind != "seq2seq" or "one text" not in step.needs, f"{step.link(0.5)} on {family}"
        else:
            assert family in reason, reason
            assert ": " in reason, reason


def test_needs_are_met_or_said() -> None:
    lacking = {
        family: entry.lacking(["linear", "separate", "sequential"]) for family, entry in architectures.FAMILIES.items()
    }
    lack = {"gpt2", "gpt_neox", "phi", "phi3", "falcon"}
    assert {family for family, reason in lacking.items() if reason is None} == {*FAMILIES} - lack
    assert lacking["gpt2"] == "needs linear layers, and gpt2 holds its matrices transposed (Conv1D)"
    assert lacking["phi"] == "needs an MLP behind attention, and phi has both side by side"
    assert "has them behind, too" in str(architectures.find("gemma2").lacking(["pre-norm"]))
    assert "is a mixture of experts" in str(architectures.find("mixtral").lacking(["dense"]))
    assert lacking["gpt_neox"] == "needs separate query, key and value, and gpt_neox holds them in one matrix"
    assert "post-norm" in str(architectures.find("bert").lacking(["pre-norm"]))
    assert "it is seq2seq" in str(architectures.find("t5").lacking(["causal"]))
    assert "subtracts the mean" in str(architectures.find("opt").lacking(["rms-norm"]))
    assert "without a gate" in str(architectures.find("opt").lacking(["gated"]))


def test_a_model_that_an_entry_does_not_describe_is_refused() -> None:
    with pytest.raises(ModelError, match=r"only those with inner_group_num=1 are described, got 2"):
        architectures.shape({**tiny("albert").config, "inner_group_num": 2})


def test_bytes_follow_the_dtype() -> None:
    config = tiny("llama").config
    assert accounting.count(config, dtype="bfloat16").n_bytes == 2 * accounting.count(config).n_params
    with pytest.raises(ModelError, match="dtype must be one of"):
        accounting.count(config, dtype="int3")


def test_an_undescribed_family_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no model type named 'lama'; did you mean 'llama'\?.*qwen2.*docs/extend"
    ):
        architectures.find("lama")


@pytest.mark.parametrize(("key", "value"), [("hidden_size", None), ("num_hidden_layers", 0), ("vocab_size", "many")])
def test_a_config_without_a_size_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"must state {key} as a positive integer"):
        architectures.shape({**tiny("llama").config, key: value})
