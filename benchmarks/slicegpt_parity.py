"""Loss, size and seconds of slicegpt beside the published code, on the same model, tokens and widths.

    python benchmarks/slicegpt_parity.py stories260K SHARED_DATA [--reference CHECKOUT --python PYTHON]
    python benchmarks/slicegpt_parity.py testbed/llama-483k [--reference CHECKOUT --python PYTHON]
    python benchmarks/slicegpt_parity.py tiny-opt [--reference CHECKOUT --python PYTHON]

CHECKOUT holds microsoft/TransformerCompression and PYTHON runs it: torch, safetensors, transformers 4.41 and
ml-collections are what this needs of its environment. stories260K is calibrated and tested on the windows of
``stories260k.py``, a model of the testbed on 512 rows of its calibration text and 200 of its test text. tiny-opt,
tiny-phi and tiny-phi3 are random models of 3 blocks, 64 wide, calibrated and tested on 64 and 32 rows that they wrote.

The published code subtracts from each embedding its mean, which is right before LayerNorm and changes a model with
RMSNorm. So it is run twice: as published, beside our method on the model changed in the same way; and with the
embeddings put back, beside our method on the model itself. It also always takes 1e-5 for the epsilon of norms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

KEPT = (0.875, 0.75, 0.625, 0.5)
"""Shares of the width, before it is rounded down to a multiple of 8."""

WEIGHTS, ROWS, ASKED = "weights.safetensors", "rows.safetensors", "asked.json"
"""What is handed over to the published code, in a folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="stories260K, or a Llama-shaped model such as testbed/llama-483k")
    parser.add_argument("data", type=Path, nargs="?", help="for stories260K: folder with models/ and tinystories/")
    parser.add_argument("--reference", type=Path, help="checkout of the published code; without it, our side alone")
    parser.add_argument("--python", default=sys.executable, help="what runs the published code")
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT, help="shares of the width")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--as-reference", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.as_reference is not None:
        print(json.dumps(published(arguments.reference, arguments.as_reference)))
        return
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from mariotte.compress.methods.slicegpt import SliceGPT
    from mariotte.compress.surgery import derive
    from mariotte.models.nll import token_nll

    model, calibration, test = subject(arguments.model, arguments.data)
    hidden = model.shape.hidden
    embedded = model.embeddings.weight.detach()
    models = {"as they are": model}
    if model.entry.rms_norm:  # LayerNorm makes no difference between the two
        models["centred"] = derive(
            model,
            {
                f"{model.entry.embeddings}.weight": embedded - embedded.mean(-1, keepdim=True),
                f"{model.entry.head}.weight": model.head.weight,
            },
            untie=True,
        )
    loss = float(token_nll(model, test, batch=8).mean())
    print(f"{arguments.model}: {model.counts.n_params:,} parameters, loss {loss:.4f}, {len(calibration)} x ", end="")
    print(f"{calibration.shape[1]} tokens calibrate, {len(test)} x {test.shape[1]} test, {arguments.threads} threads")
    print("| embeddings | width | parameters | ours | published | apart | ours, s | published, s | times | of CPU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    one_pass = SliceGPT(sequential=False)
    for name, dense in models.items():
        for kept in arguments.kept:
            _, before = ours(SliceGPT(), dense, calibration, 1 - kept)
            found = None
            if arguments.reference is not None:
                found = ask(arguments, dense, calibration, test, 1 - kept, centre=name == "centred")
            cut, after = ours(SliceGPT(), dense, calibration, 1 - kept)
            # Before and after, since others may be using the machine: a load that changes shows on both sides.
            wall, cpu = ((x + y) / 2 for x, y in zip(before, after, strict=True))
            loss = float(token_nll(cut, test, batch=8).mean())
            row = [name, f"{cut.shape.hidden} of {hidden}", f"{cut.counts.n_params:,}", f"{loss:.4f}"]
            if found is not None:
                assert found["parameters"] == cut.counts.n_params, (found, cut.counts)
                row += [
                    f"{found['loss']:.4f}",
                    f"{loss / found['loss'] - 1:+.3%}",
                    f"{wall:.2f}",
                    f"{found['wall']:.2f}",
                ]
                row += [f"{found['wall'] / wall:.1f}", f"{found['cpu'] / cpu:.1f} ({found['cpu']:.2f} / {cpu:.2f})"]
            print(f"| {' | '.join(row)} |", flush=True)
    for kept in arguments.kept:
        cut, taken = ours(one_pass, model, calibration, 1 - kept)
        loss = float(token_nll(cut, test, batch=8).mean())
        print(f"sequential=false: {cut.shape.hidden} of {hidden}, loss {loss:.4f}, {taken[0]:.2f} s")


def subject(name: str, data: Path | None) -> tuple[Any, Tensor, Tensor]:
    """The dense model, its calibration rows and its test rows."""
    from mariotte.data import corpora, tokens
    from mariotte.models.load import load

    if name == "stories260K":
        from stories260k import CALIBRATION, TEST, windows

        assert data is not None, "stories260K needs the folder with models/ and tinystories/"
        rows = windows(data)
        return load(data / "models" / "stories260K"), rows[:CALIBRATION], rows[-TEST:]
    if name.startswith("tiny-"):
        return written_by_itself(name.removeprefix("tiny-"))
    model = load(name)
    corpus = corpora.find("testbed/all")
    calibration = tokens.blocks(corpus, "calibration", model.tokenizer, 64, 512)
    return model, calibration, tokens.blocks(corpus, "test", model.tokenizer, 64, 200)


def written_by_itself(family: str) -> tuple[Any, Tensor, Tensor]:
    """A random model, and rows of 64 tokens drawn from its own predictions: the text of which it is the best model."""
    from mariotte.testing.tiny import random_tokens, tiny

    model = tiny(family, hidden=64, heads=4, kv_heads=4, layers=3, ffn=128, **ALIKE[family])
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": 63, "max_new_tokens": 63, "pad_token_id": 0}
    first = random_tokens(96, 1)
    torch.manual_seed(0)
    rows = model.hf.generate(first, attention_mask=torch.ones_like(first), **settings)
    return model, rows[:64], rows[64:]


ALIKE: dict[str, dict[str, Any]] = {"opt": {}, "phi": {}, "phi3": {"sliding_window": None, "rms_norm_eps": 1e-5}}
"""What the published code cannot have otherwise."""


def ours(step: Any, dense: Any, calibration: Tensor, amount: float) -> tuple[Any, tuple[float, float]]:
    """The sliced model, and the seconds it took to make it from nothing: on the clock, and of the processor."""
    from mariotte.models.step import Context

    with tempfile.TemporaryDirectory() as scratch:
        context = Context(dense=dense, scratch=Path(scratch), calibration=calibration)
        start = time.perf_counter(), time.process_time()
        cut = step.apply(dense, step.prepare(dense, context, [amount]), amount, context)
        return cut, (time.perf_counter() - start[0], time.process_time() - start[1])


def ask(
    arguments: argparse.Namespace, dense: Any, calibration: Tensor, test: Tensor, amount: float, *, centre: bool
) -> dict[str, Any]:
    """What the published code makes of the same model, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        handed = Path(folder)
        state = {"lm_head.weight": dense.head.weight, **dense.hf.state_dict()}
        save_file({key: value.detach().clone() for key, value in state.items()}, handed / WEIGHTS)
        save_file({"calibration": calibration.contiguous(), "test": test.contiguous()}, handed / ROWS)
        asked = {"config": dense.config, "amount": amount, "centre": centre}
        (handed / ASKED).write_text(json.dumps(asked), encoding="utf-8")
        command = [arguments.python, __file__, "-", "--reference", arguments.reference, "--as-reference", handed]
        command += ["--threads", str(arguments.threads)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the published code failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def adapted(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """The model that a config of ours describes, in the classes of earlier transformers, in the published adapter."""
    from slicegpt.adapters import llama_adapter, opt_adapter, phi2_adapter, phi3_adapter
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PhiConfig, PhiForCausalLM

    kind = config["model_type"]
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    keys += {"opt": ("ffn_dim", "word_embed_proj_dim")}.get(kind, ("intermediate_size", "num_key_value_heads"))
    keys += {"opt": ("activation_function",), "phi": ("layer_norm_eps",)}.get(kind, ("rms_norm_eps",))
    keys += () if kind == "opt" else ("hidden_act",)
    stated = {key: config[key] for key in (*keys, "pad_token_id")} | {"tie_word_embeddings": False, "use_cache": False}
    rope = config.get("rope_parameters") or {}
    stated |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if kind != "opt" and "head_dim" in config:
        assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"], (
            "it knows no other head size"
        )
    if kind == "phi3":
        # The model's code was not yet in transformers' own names when the adapter was written.
        from transformers import Phi3Config, Phi3ForCausalLM
    made, adapter = {
        "llama": lambda: (LlamaForCausalLM(LlamaConfig(**stated)), llama_adapter.LlamaModelAdapter),
        "opt": lambda: (OPTForCausalLM(OPTConfig(**stated)), opt_adapter.OPTModelAdapter),
        "phi": lambda: (PhiForCausalLM(PhiConfig(**stated)), phi2_adapter.Phi2ModelAdapter),
        "phi3": lambda: (Phi3ForCausalLM(Phi3Config(**stated)), phi3_adapter.Phi3ModelAdapter),
    }[kind]()
    made.load_state_dict(state)
    return adapter(made.eval())


@torch.no_grad()
def published(checkout: Path, handed: Path) -> dict[str, Any]:
    """Run the published code on what was handed over; called in its own environment."""
    # Its modules without its package's own imports, which ask for data sets, plots and trackers.
    package = types.ModuleType("slicegpt")
    package.__path__ = [str(checkout / "src" / "slicegpt")]
    sys.modules["slicegpt"] = package
    from slicegpt import layernorm_fusion, rotate
    from slicegpt.slicing_scheduler import ConstSlicingScheduler

    asked = json.loads((handed / ASKED).read_text(encoding="utf-8"))
    config, state, rows = asked["config"], load_file(handed / WEIGHTS), load_file(handed / ROWS)
    adapter = adapted(config, state)
    model = adapter.model
    # Batches of 16 rows, its default.
    batches = rows["calibration"].split(16)
    loader = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    width = int((1 - asked["amount"]) * adapter.hidden_size)
    width -= width % 8
    start = time.perf_counter(), time.process_time()
    layernorm_fusion.replace_layers(adapter)
    layernorm_fusion.fuse_modules(adapter)
    if not asked["centre"] and "rms_norm_eps" in config:
        model.model.embed_tokens.weight.data = state["model.embed_tokens.weight"].clone()
    rotate.rotate_and_slice(adapter, loader, ConstSlicingScheduler(width), final_orientation="pca")
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    total, count = 0.0, 0
    for batch in rows["test"].split(8):
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        total += float(functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"loss": total / count, "parameters": parameters, "wall": wall, "cpu": cpu, "width": width}


if __name__ == "__main__":
    main()
