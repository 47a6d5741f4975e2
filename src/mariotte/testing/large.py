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
    vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write a random model of Llama's shape, with the tokenizer of the testbed; a shard is in memory at once.

    Parameters
    ----------
    folder : must not exist yet
    hidden, layers, ffn, heads, kv_heads : sizes
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
            tensors |= {f"{at}.mlp.{p}_proj.weight": matrix(ffn, hidden) for p in ("gate", "up")}
            tensors[f"{at}.mlp.down_proj.weight"] = matrix(hidden, ffn)
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
