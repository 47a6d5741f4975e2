"""Peak memory and time of streamed and of whole runs on one model: what streaming saves and what it costs.

    python benchmarks/streaming.py --hidden 448 --layers 32 --ffn 448 --out benchmarks/results

The model is random, of Llama's shape, on disk in float32. Every run is a process of its own, which first does the same
on a testbed model of no size; the peak is its resident memory from then on, less what it had then. One thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mariotte import chain as chains
from mariotte.experiments import identity
from mariotte.experiments.environment import environment
from mariotte.experiments.estimate import preflight
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint
from mariotte.models.hardware import resident_bytes, stated_bytes
from mariotte.testing.large import large

CHAINS = ("ffn@0.3", "slice@0.25", "wanda@0.5", "rtn@4")
WARM_UP = "testbed/qwen2-46k"


def run(model: str, text: str, streamed: bool, folder: Path) -> None:
    """One chain, from the files to the checkpoint."""
    how = {"calibration": "testbed/all", "rows": 8, "block": 64}
    done = compress_model(model, text, stream=folder / "scratch" if streamed else None, **how)
    checkpoint.save(done, folder / "out")


def child(model: str, text: str, streamed: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=Path(model).parent) as folder:
        run(WARM_UP, text, streamed, Path(folder, "warm"))
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        began = time.perf_counter(), time.process_time()
        run(model, text, streamed, Path(folder, "run"))
        peak = stated_bytes("/proc/self/status", "VmHWM")
        assert peak is not None
        return {
            "peak_bytes": peak - before,
            "seconds": time.perf_counter() - began[0],
            "processor_s": time.process_time() - began[1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=448)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ffn", type=int, default=448)
    parser.add_argument("--chains", nargs="*", default=CHAINS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        model, text, streamed = asked.child
        print(json.dumps(child(model, text, streamed == "streamed")))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        n_bytes = large(model, hidden=asked.hidden, layers=asked.layers, ffn=asked.ffn)
        for text in asked.chains:
            found: dict[str, Any] = {}
            for how in ("streamed", "whole"):
                command = [sys.executable, __file__, "--child", str(model), text, how]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[how] = json.loads(done.stdout.splitlines()[-1])
            settings = {"calibration": "testbed/all", "rows": 8, "block": 64, "device": "cpu", "dtype": None}
            takes = preflight(str(model), identity.resolve(chains.parse(text)), stream=True, **settings)
            rows.append({"chain": text, **found, "expected_bytes": takes.streamed_bytes})
            print(json.dumps(rows[-1]), flush=True)
    lines = [
        f"# Streaming, {datetime.date.today().isoformat()}",
        "",
        f"`python benchmarks/streaming.py --hidden {asked.hidden} --layers {asked.layers} --ffn {asked.ffn}`: "
        f"{n_bytes / 1e6:.0f} MB of weights in float32, a block {n_bytes / 1e6 / asked.layers:.1f} MB, 512 calibration "
        "tokens, one thread; the processor was shared. Peaks are beside the program, to the saved and compared "
        "checkpoint; time is the processor's.",
        "",
        "| chain | streamed, MB | expected, MB | whole, MB | memory, streamed : whole | time, streamed : whole |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, other = row["streamed"], row["whole"]
        lines.append(
            f"| `{row['chain']}` | {one['peak_bytes'] / 1e6:.1f} | {row['expected_bytes'] / 1e6:.1f} | "
            f"{other['peak_bytes'] / 1e6:.1f} | {one['peak_bytes'] / other['peak_bytes']:.2f} | "
            f"{one['processor_s'] / other['processor_s']:.2f} |"
        )
    print("\n".join(lines))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "streaming.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        stated = {"environment": environment("cpu"), "n_bytes": n_bytes, "rows": rows}
        (asked.out / "streaming.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
