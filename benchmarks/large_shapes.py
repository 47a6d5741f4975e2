"""What compression costs and gains at the shapes of large models: Llama 3 8B cut to half, LoRA on Llama 3.2 1B.

python benchmarks/large_shapes.py [--size small|large] [--device DEVICE] [--chains CHAIN ...] [--out FOLDER]
python benchmarks/large_shapes.py --streamed [--folder FOLDER] [the same]

Weights, calibration tokens and prompts are random: times and memory depend on the shapes alone. For every chain:
seconds to prepare and to apply, the peak of memory meanwhile, and the speed of prefill and decode against the dense
model. Then 100 LoRA steps: tokens a second, and the share of what the machine does at most in a large matrix product.
Without a GPU the size is small: a million parameters on one thread, timed by the processor's own clock, which says
that the script works and little more.
Writes large_shapes_DEVICE.json and .md.

Streamed: the model is on disk, in bfloat16, and never whole on the device; every chain is a process of its own, from
the files to the saved and compared checkpoint. What counts is the peak of what is on the device, as a share of the
model's bytes; with a CPU as the device, of what the process takes beside the program. The large size needs a folder
with 50 GB of room, the small one, a quarter of its widths and a sixteenth of its parameters, 4 GB.
Writes large_shapes_streamed_DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mariotte import accounting
from mariotte import chain as chains
from mariotte.data.tokens import separator_of
from mariotte.evaluate.base import Measurement
from mariotte.evaluate.measures.speed import Speed
from mariotte.experiments.environment import environment
from mariotte.experiments.identity import resolve
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint
from mariotte.models.hardware import resident_bytes
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context, apply_at, prepare_once
from mariotte.testing.large import large

HALF = 0.5
MINUTES, DECODE = 3.0, 1.8
"""Goals for the large shape on a GPU: minutes to cut it to half, and decode against dense."""

LORA_STEPS, LORA_WARM_UP = 100, 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done at one size.

    Parameters
    ----------
    cut, tuned : shapes of the model that is cut and of the one that LoRA trains
    chains : each cuts to half of all parameters
    rows, block : calibration tokens
    speed : how the models are timed
    batch, length : rows of a LoRA step, tokens of a row
    """

    cut: dict[str, Any]
    tuned: dict[str, Any]
    chains: tuple[str, ...]
    rows: int
    block: int
    speed: Speed
    batch: int
    length: int


def sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    """A Llama's sizes, as its config calls them."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


CUTS = tuple(f"{name}@{HALF}(of=model)" for name in ("slice", "ffn", "shortgpt"))
PLANS = {
    "large": Plan(
        cut=sizes(4096, 32, 32, 8, 14336, 128256),
        tuned=sizes(2048, 16, 32, 8, 8192, 128256, tied=True),
        chains=(*CUTS, f"auto@{HALF}(search=8)"),
        rows=32,
        block=1024,
        speed=Speed(batch=1, prompt=1024, new=64, seconds=20.0),
        batch=8,
        length=1024,
    ),
    "small": Plan(
        cut=sizes(128, 4, 4, 1, 448, 1024),
        tuned=sizes(96, 3, 3, 1, 320, 1024, tied=True),
        chains=(*CUTS, f"auto@{HALF}(search=4)"),
        rows=8,
        block=64,
        speed=Speed(batch=1, prompt=64, new=8, clock="cpu"),
        batch=4,
        length=64,
    ),
}


STREAMED = {
    "large": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256},
    "small": {"hidden": 1024, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 3584, "vocab": 32064},
}
STREAMED_CHAINS = (
    f"shortgpt@{HALF}",
    f"heads@{HALF}",
    f"ffn@{HALF}(criterion=norm, compensate=false)",
    f"wanda@{HALF}",
    "rtn@4",
    "int8",
)
"""What is done without the second moment of an MLP, which alone is a tenth of such a model's bytes."""
SHARE = 0.25
"""Goal: of the model's bytes, what is on the device at most."""

WARM_UP = "testbed/qwen2-46k"


def random_model(
    shape: dict[str, Any], device: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None
) -> Model:
    """A Llama of one shape, as initialised."""
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, dtype=dtype)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    fingerprint = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return Model(hf, tokenizer, name="random", fingerprint=fingerprint, stored_dtype=dtype)


class Peak:
    """The peak of memory since it was made: of the accelerator's tensors, or of the whole process on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # not Linux: the peak is then the process' since its start
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak until now."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronised(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def cut_one(text: str, dense: Model, timed: Measurement, plan: Plan, device: str) -> dict[str, Any]:
    """One chain of one step, and its result against the dense model."""
    (part,) = resolve(chains.parse(text))
    generator = torch.Generator().manual_seed(1)
    tokens_NT = torch.randint(0, dense.shape.vocab, (plan.rows, plan.block), generator=generator)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(dense=dense, scratch=Path(scratch), calibration=tokens_NT, corpus="random", block=plan.block)
        peak = Peak(device)
        started = synchronised(device)
        prepared = prepare_once(part.step, dense, context, [part.amount])
        between = synchronised(device)
        cut = apply_at(part.step, dense, prepared, part.amount, context)
        ended = synchronised(device)
        peak_bytes = peak.bytes()
    found = plan.speed.compare(cut, dense, timed)
    return {
        "chain": text,
        "prepare_s": between - started,
        "apply_s": ended - between,
        "peak_bytes": peak_bytes,
        "n_params": cut.counts.n_params,
        "removed": 1 - cut.counts.n_params / dense.counts.n_params,
        "speed": {**found.metrics, **found.details},
    } | ({"found": cut.done[-1].facts["chain"]} if "chain" in cut.done[-1].facts else {})


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """The most that a large matrix product does a second: what utilisation is a share of."""
    n = 8192 if device.startswith("cuda") else 1024
    a_NN, b_NN = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = synchronised(device)
        torch.mm(a_NN, b_NN)
        best = min(best, synchronised(device) - started)
    return 2 * n**3 / best


def tune(plan: Plan, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """LoRA steps on the testbed's text, whose words are the first tokens of the vocabulary.

    The time is that of a long run less that of a short one, so that loading text, merging and first calls have no part
    in it. FLOPs: a forward pass, and as many again to hand gradients through the frozen weights; what the adapters add,
    under 2 % at rank 16, is left out.
    """
    tokenizer = load("testbed/qwen2-113k").tokenizer
    assert tokenizer is not None
    assert separator_of(tokenizer) is not None
    model = random_model(plan.tuned, device, dtype, tokenizer)
    seconds: list[float] = []
    peak = Peak(device)
    for steps in (LORA_WARM_UP, LORA_STEPS + LORA_WARM_UP):
        tokens = steps * plan.batch * plan.length
        (part,) = resolve(chains.parse(f"lora@{tokens}(batch={plan.batch}, block={plan.length}, corpus=testbed/all)"))
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(dense=model, scratch=Path(scratch), block=plan.length)
            started = synchronised(device)
            apply_at(part.step, model, prepare_once(part.step, model, context, [part.amount]), part.amount, context)
            seconds.append(synchronised(device) - started)
    passed = LORA_STEPS * plan.batch * plan.length
    per_second = passed / (seconds[1] - seconds[0])
    forward = accounting.count_shape(model.shape, context=plan.length // 2).flops_per_token
    most = matmul_flops(device, dtype)
    return {
        "n_params": model.counts.n_params,
        "steps": LORA_STEPS,
        "batch": plan.batch,
        "block": plan.length,
        "seconds": seconds[1] - seconds[0],
        "tokens_per_s": per_second,
        "flops_per_token": 2 * forward,
        "matmul_flops_per_s": most,
        "utilisation": 2 * forward * per_second / most,
        "peak_bytes": peak.bytes(),
    }


def markdown(result: dict[str, Any]) -> str:
    where, cut, lora = result["environment"], result["cut"], result["lora"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("mariotte", "torch", "transformers", "python"))
    gpu = where["device"] == "cuda"
    lines = [
        f"# Large shapes, {result['size']} size, {result['date']}",
        "",
        f"`python benchmarks/large_shapes.py --size {result['size']} --device {result['device']}` "
        f"on {where['hardware']}, {where['threads']} thread(s), {result['dtype']}; {versions}. Random weights, "
        "calibration and prompts.",
        ""
        if gpu
        else "The processor was shared with other work, and the models are tiny: this says that the script "
        "works, and nothing of the shapes that it is for.",
        "",
        f"Dense: {cut['dense_params']:,} parameters, {cut['shape']['num_hidden_layers']} layers of width "
        f"{cut['shape']['hidden_size']}. Speed: batch {cut['speed']['batch']}, prompt {cut['speed']['prompt']}, "
        f"{cut['speed']['new']} new tokens; dense time ÷ compressed time with its 95 % interval, and the verdict"
        + ("." if cut["speed"]["clock"] == "wall" else ", both in time of the processor, one thread."),
        "",
        "| chain | removed | prepare s | apply s | peak GiB | prefill | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in cut["chains"]:
        speeds = [
            f"{row['speed'][part]['speedup']:.2f} ({row['speed'][part]['interval'][0]:.2f} to "
            f"{row['speed'][part]['interval'][1]:.2f}) {row['speed'][part]['verdict']}"
            for part in ("prefill", "decode")
        ]
        chain = f"`{row['chain']}`" + (f": `{row['found']}`" if "found" in row else "")
        chain = chain.replace("|", r"\|")
        lines.append(
            f"| {chain} | {row['removed']:.1%} | {row['prepare_s']:.2f} | {row['apply_s']:.2f} | "
            f"{row['peak_bytes'] / 2**30:.2f} | {speeds[0]} | {speeds[1]} |"
        )
    lines += [
        "",
        f"Peak of memory: {'tensors on the GPU' if gpu else 'the whole process'}, the dense model among them.",
    ]
    if result["size"] == "large":
        minutes = max(row["prepare_s"] + row["apply_s"] for row in cut["chains"]) / 60
        decode = max(row["speed"]["speedup_decode"] for row in cut["chains"])
        lines += [
            "",
            f"Goals: at most {MINUTES:g} minutes a chain (the slowest took {minutes:.1f}), decode at least {DECODE:g} "
            f"times dense (the fastest {decode:.2f}).",
        ]
    lines += [
        "",
        f"LoRA, {lora['n_params']:,} parameters, rank 16, {lora['steps']} steps of {lora['batch']} × {lora['block']} "
        f"tokens: {lora['seconds']:.2f} s, {lora['tokens_per_s']:,.0f} tokens/s, "
        f"{lora['utilisation']:.1%} of the {lora['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s of a large matrix product "
        f"in the same dtype (a forward pass and as many FLOPs backward; frozen weights have no gradients), peak "
        f"{lora['peak_bytes'] / 2**30:.2f} GiB.",
        "",
        f"The whole run took {result['seconds']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def stream_one(model: str, text: str, device: str) -> dict[str, Any]:
    """One chain of a model on disk, from its files to the checkpoint: peaks of memory, and time."""

    def run(name: str, folder: Path) -> None:
        how = {"calibration": "testbed/all", "rows": 8, "block": 64, "device": device, "dtype": "bfloat16"}
        checkpoint.save(compress_model(name, text, stream=folder / "scratch", **how), folder / "out")

    with tempfile.TemporaryDirectory(dir=Path(model).parent) as folder:
        run(WARM_UP, Path(folder, "warm"))  # everything imported and compiled
        before = resident_bytes()
        peak, host = Peak(device), Peak("cpu")
        started = synchronised(device)
        run(model, Path(folder, "run"))
        seconds = synchronised(device) - started
        taken = host.bytes() - before
        return {"device_bytes": peak.bytes() if peak.cuda else taken, "host_bytes": taken, "seconds": seconds}


def stream(size: str, texts: Sequence[str], device: str, place: Path | None) -> dict[str, Any]:
    """Every chain on a model that is written shard by shard."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=place) as folder:
        model = Path(folder, "model")
        n_bytes = large(model, **STREAMED[size], dtype=torch.bfloat16)
        print(f"{n_bytes / 1e9:.2f} GB of weights written", flush=True)
        for text in texts:
            command = [sys.executable, __file__, "--child", str(model), text, device]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{text}: {done.stderr[-2000:]}")
            rows.append({"chain": text, **json.loads(done.stdout.splitlines()[-1])})
            rows[-1]["share"] = rows[-1]["device_bytes"] / n_bytes
            print(f"{text}: {rows[-1]['share']:.3f} of the model, {rows[-1]['seconds']:.1f} s", flush=True)
    return {"shape": STREAMED[size], "n_bytes": n_bytes, "chains": rows}


def markdown_streamed(result: dict[str, Any]) -> str:
    where, shape = result["environment"], result["shape"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("mariotte", "torch", "transformers", "python"))
    gpu = where["device"] == "cuda"
    lines = [
        f"# Large shapes, streamed, {result['size']} size, {result['date']}",
        "",
        f"`python benchmarks/large_shapes.py --streamed --size {result['size']} --device {result['device']}` "
        f"on {where['hardware']}, {where['threads']} thread(s), {result['dtype']}; {versions}. Random weights on disk, "
        f"{result['n_bytes'] / 1e9:.2f} GB in {shape['layers']} layers of width {shape['hidden']}, MLPs of "
        f"{shape['ffn']}, {shape['vocab']:,} words; 512 calibration tokens. Each chain from the files to the saved "
        "and compared checkpoint.",
        ""
        if gpu
        else "No GPU was there: the device is the processor, and its peak that of the process, beside the "
        "program, everything that a GPU's host would hold in it. The processor was shared: times say little.",
        "",
        f"| chain | on the {'GPU' if gpu else 'device'} at most, MB | share of the model | goal, at most {SHARE:g} | "
        + ("on the host beside the program, MB | " if gpu else "")
        + "s |",
        "|---|---|---|---|---|" + ("---|" if gpu else ""),
    ]
    for row in result["chains"]:
        verdict = "reached" if row["share"] <= SHARE else "missed"
        on_host = f"{row['host_bytes'] / 1e6:,.0f} | " if gpu else ""
        lines.append(
            f"| `{row['chain']}` | {row['device_bytes'] / 1e6:,.0f} | {row['share']:.3f} | {verdict} | {on_host}"
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def measure(plan: Plan, texts: Sequence[str], device: str, dtype: torch.dtype) -> dict[str, Any]:
    dense = random_model(plan.cut, device, dtype, None)
    timed = plan.speed.measure(dense)
    rows: list[dict[str, Any]] = []
    for text in texts:
        rows.append(cut_one(text, dense, timed, plan, device))
        print(f"{text}: {rows[-1]['prepare_s'] + rows[-1]['apply_s']:.1f} s", flush=True)
    cut = {
        "shape": plan.cut,
        "dense_params": dense.counts.n_params,
        "dense_speed": timed.metrics,
        "calibration": {"rows": plan.rows, "block": plan.block},
        "speed": asdict(plan.speed),
        "chains": rows,
    }
    del dense
    gc.collect()
    return {"cut": cut, "lora": tune(plan, device, dtype)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=sorted(PLANS), default="large" if gpu else "small")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="the small size is for a CPU")
    parser.add_argument("--chains", nargs="*", help="others than slice, ffn, shortgpt and auto at half; one step each")
    parser.add_argument("--streamed", action="store_true", help="a model on disk, never whole on the device")
    parser.add_argument("--folder", type=Path, help="where the streamed model, scratch and checkpoints have room")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1 if options.child[2] == "cpu" else torch.get_num_threads())
        print(json.dumps(stream_one(*options.child)))
        return
    plan: Plan = PLANS[options.size]
    on_gpu = options.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu or options.streamed else torch.float32
    if plan.speed.clock == "cpu":
        torch.set_num_threads(1)
    started = time.perf_counter()
    if options.streamed:
        found = stream(options.size, options.chains or STREAMED_CHAINS, options.device, options.folder)
    else:
        found = measure(plan, options.chains or plan.chains, options.device, dtype)
    result = {
        "date": datetime.date.today().isoformat(),
        "size": options.size,
        "device": options.device,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": environment(options.device),
        "seconds": time.perf_counter() - started,
        **found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "large_shapes_streamed" if options.streamed else "large_shapes"
    written = markdown_streamed(result) if options.streamed else markdown(result)
    path = options.out / f"{kind}_{options.device.partition(':')[0]}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
