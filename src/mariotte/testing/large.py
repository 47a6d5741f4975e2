"""Random models on disk of any size, in shards of a block each: what models larger than memory are tried on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from mariotte.models.load import load


def large(folder: Path, *, hidden: int, layers: int, ffn: int) -> int:
    """Write a random model of Llama's shape, with the tokenizer of the testbed.

    Parameters
    ----------
    folder : must not exist yet
    hidden, layers, ffn : sizes; 8 heads, float32

    Returns
    -------
    Bytes of its weights
    """
    source = load("testbed/qwen2-46k")
    folder.mkdir(parents=True)
    assert source.tokenizer is not None
    source.tokenizer.save_pretrained(folder)
    vocab = source.shape.vocab
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": hidden // 8,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (1.5 / shape[1] ** 0.5)

    index: dict[str, str] = {}
    total = 0
    for layer in range(-1, layers):
        if layer < 0:
            name = "ends"
            tensors = {f"{at}.weight": matrix(vocab, hidden) for at in ("model.embed_tokens", "lm_head")}
            tensors["model.norm.weight"] = torch.ones(hidden)
        else:
            at = f"model.layers.{layer}"
            name = f"{layer:03}"
            tensors = {f"{at}.self_attn.{p}_proj.weight": matrix(hidden, hidden) for p in "qkvo"}
            tensors |= {f"{at}.mlp.{p}_proj.weight": matrix(ffn, hidden) for p in ("gate", "up")}
            tensors[f"{at}.mlp.down_proj.weight"] = matrix(hidden, ffn)
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{at}.{p}.weight": 1 + 0.1 * torch.randn(hidden, generator=generator) for p in norms}
        file = f"model-{name}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    stated = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stated), encoding="utf-8")
    return total
