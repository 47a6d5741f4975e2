"""Random models on disk of any size, in shards of a block each: what models larger than memory are tried on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from mariotte.models.load import load


def large(
    folder: Path,
    *,
    hidden: int,
    layers: int,
    ffn: int,
    heads: int = 8,
    kv_heads: int = 8,
    experts: int = 0,
    vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write a random model of Llama's shape, or Mixtral's, with the testbed's tokenizer; a shard is in memory at once.

    Parameters
    ----------
    folder : must not exist yet
    hidden, layers, ffn, heads, kv_heads : sizes
    experts : MLPs of a block, of which a token takes two; 0 makes it a Llama
    vocab : None takes the tokenizer's; of a larger one text uses the first tokens
    dtype : of its weights

    Returns
    -------
    Bytes of its weights
    """
    source = load("testbed/qwen2-46k")
    folder.mkdir(parents=True)
    assert source.tokenizer is not None
    source.tokenizer.save_pretrained(folder)
    vocab = vocab or source.shape.vocab
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if experts:
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * (1.5 / shape[1] ** 0.5)).to(dtype)

    index: dict[str, str] = {}
    total = 0
    for layer in range(-1, layers):
        if layer < 0:
            name = "ends"
            tensors = {f"{at}.weight": matrix(vocab, hidden) for at in ("model.embed_tokens", "lm_head")}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
        else:
            at = f"model.layers.{layer}"
            name = f"{layer:03}"
            shared = hidden // heads * kv_heads
            outputs = {"q": hidden, "k": shared, "v": shared, "o": hidden}
            tensors = {f"{at}.self_attn.{p}_proj.weight": matrix(n, hidden) for p, n in outputs.items()}
            mlps = [f"{at}.block_sparse_moe.experts.{expert}" for expert in range(experts)] or [f"{at}.mlp"]
            gate, up, down = ("w1", "w3", "w2") if experts else ("gate_proj", "up_proj", "down_proj")
            for mlp in mlps:
                tensors |= {f"{mlp}.{part}.weight": matrix(ffn, hidden) for part in (gate, up)}
                tensors[f"{mlp}.{down}.weight"] = matrix(hidden, ffn)
            if experts:
                tensors[f"{at}.block_sparse_moe.gate.weight"] = matrix(experts, hidden)
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {
                f"{at}.{p}.weight": (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype) for p in norms
            }
        file = f"model-{name}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    stated = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stated), encoding="utf-8")
    return total
