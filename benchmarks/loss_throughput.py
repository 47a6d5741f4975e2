"""Our loss beside lm-eval's loop, on the same model and the same texts: tokens a second, and the numbers found.

    python benchmarks/loss_throughput.py MODEL --on CORPUS [--length 256] [--documents 200] [--rounds 5]

Both score every token of the same documents in one process, by turns, with windows of the same tokens: ours through
the measure ``loss`` with ``windows=documents``, theirs through ``HFLM.loglikelihood_rolling`` at several batch sizes,
of which the quickest counts. Each tokenizes its texts anew every round, and neither draws progress bars. Prints the
median over rounds of tokens a second, by the clock and, on a CPU, in the process's own time, which others that use the
machine leave nearly alone; the ratios of these medians, and the least and the largest of the rounds' own ratios; and
the largest difference between the losses of a document. Needs lm-eval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import transformers

from mariotte.data import corpora
from mariotte.evaluate.measures import loss as measured
from mariotte.evaluate.measures.loss import Loss
from mariotte.models.load import load

THEIR_BATCHES = (1, 4, 16, 64)


def timed(run: Callable[[], list[float]]) -> tuple[list[float], float, float]:
    """What `run` gives, with its seconds by the clock and of the processor."""
    wall, own = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--on", default="testbed/all", help="corpus")
    parser.add_argument("--length", type=int, default=63, help="tokens that the model reads at once, at most")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=THEIR_BATCHES, help="lm-eval's rows in one pass")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    # Both start from the same strings: drawing the testbed's rows, or the splits of a file, is no part of a loss.
    texts = list(islice(corpora.find(given.on).documents("test"), given.documents))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8"
        )
        compare(given, texts, Loss(on=f"file:{folder}", windows="documents", block=given.length + 1, rows=len(texts)))


def compare(given: argparse.Namespace, texts: list[str], measure: Loss) -> None:
    """Run both by turns and print the table."""
    from importlib.metadata import version

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = load(given.model, device=given.device)
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]

    class Quiet(HFLM):
        """Without the progress bar that lm-eval draws for every batch of windows."""

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    harnesses = {
        batch: Quiet(
            pretrained=model.hf,
            tokenizer=model.tokenizer,
            max_length=given.length,
            batch_size=batch,
            add_bos_token=False,
        )
        for batch in given.batches
    }

    def ours() -> list[float]:
        measured._blocks.cache_clear()
        return measure.measure(model).details["documents"]["nll"]

    def theirs(batch: int) -> list[float]:
        return [-value for value in harnesses[batch].loglikelihood_rolling(asked, disable_tqdm=True)]

    runs = {"mariotte": ours} | {f"lm-eval, batches of {b}": lambda b=b: theirs(b) for b in given.batches}
    walls: dict[str, list[float]] = {name: [] for name in runs}
    owns: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        for name, run in runs.items():
            found[name], wall, own = timed(run)
            if number:  # the first round warms up
                walls[name].append(wall)
                owns[name].append(own)

    n_tokens = measure.protocol(model)["scored_tokens"]
    apart = max(
        abs(a - b) / max(1.0, abs(b)) for name in runs for a, b in zip(found["mariotte"], found[name], strict=True)
    )
    print(
        f"{given.model} on {given.on}: {len(texts)} documents, {n_tokens} tokens scored, windows of {given.length}, "
        f"{given.rounds} rounds, {torch.get_num_threads()} threads, {given.device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, lm-eval {version('lm_eval')}"
    )
    print(f"{'tokens a second, median':28}{'clock':>10}{'processor':>12}")
    for name in runs:
        speeds = (n_tokens / statistics.median(times[name]) for times in (walls, owns))
        print(f"{name:28}{next(speeds):10,.0f}{next(speeds):12,.0f}")
    for kind, times in (("clock", walls), ("processor", owns)):
        best = min((name for name in runs if name != "mariotte"), key=lambda name: statistics.median(times[name]))
        ratio = statistics.median(times[best]) / statistics.median(times["mariotte"])
        each = [theirs / ours for theirs, ours in zip(times[best], times["mariotte"], strict=True)]
        print(f"ratio to {best}, {kind}: {ratio:.2f}, in single rounds {min(each):.2f} to {max(each):.2f}")
    print(f"largest difference of a document's loss: {apart:.1e}, relative")


if __name__ == "__main__":
    main()
