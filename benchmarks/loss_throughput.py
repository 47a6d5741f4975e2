"""Our loss beside lm-eval's loop, on the same model and the same texts: tokens a second, and the numbers found.

    python benchmarks/loss_throughput.py MODEL --on CORPUS [--length 256] [--documents 200] [--rounds 5]

Both score every token of the same documents in one process, by turns, with windows of the same tokens: ours through
the measure ``loss`` with ``windows=documents``, theirs through ``HFLM.loglikelihood_rolling`` at several batch sizes,
of which the quickest counts. Each tokenizes its texts anew every round. Prints tokens a second in the quickest round
of each, in the process's own time on a CPU, which others that use it leave nearly alone; the ratio; and the largest
difference between the losses of a document. Needs lm-eval.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from mariotte.data import corpora
from mariotte.evaluate.measures import loss as measured
from mariotte.evaluate.measures.loss import Loss
from mariotte.models.load import load

THEIR_BATCHES = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--on", default="testbed/all", help="corpus")
    parser.add_argument("--length", type=int, default=63, help="tokens that the model reads at once, at most")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = load(given.model, device=given.device)
    texts = list(islice(corpora.find(given.on).documents("test"), given.documents))
    # Both start from the same strings: drawing the testbed's rows, or the splits of a file, is no part of a loss.
    folder = Path(tempfile.mkdtemp())
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    measure = Loss(on=f"file:{folder}", windows="documents", block=given.length + 1, rows=len(texts))
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    harnesses = {
        batch: HFLM(
            pretrained=model.hf,
            tokenizer=model.tokenizer,
            max_length=given.length,
            batch_size=batch,
            add_bos_token=False,
        )
        for batch in THEIR_BATCHES
    }

    def ours() -> list[float]:
        measured._blocks.cache_clear()
        return measure.measure(model).details["documents"]["nll"]

    def theirs(batch: int) -> list[float]:
        return [-value for value in harnesses[batch].loglikelihood_rolling(asked, disable_tqdm=True)]

    clock = time.process_time if given.device == "cpu" else time.perf_counter
    runs = {"mariotte": ours} | {f"lm-eval, batches of {b}": lambda b=b: theirs(b) for b in THEIR_BATCHES}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        for name, run in runs.items():
            started = clock()
            found[name] = run()
            if number:  # the first round warms up
                seconds[name].append(clock() - started)

    n_tokens = measure.protocol(model)["scored_tokens"]
    speed = {name: n_tokens / min(times) for name, times in seconds.items()}
    apart = max(
        abs(a - b) / max(1.0, abs(b)) for name in runs for a, b in zip(found["mariotte"], found[name], strict=True)
    )
    print(
        f"{given.model} on {given.on}: {len(texts)} documents, {n_tokens} tokens scored, windows of {given.length}, "
        f"{torch.get_num_threads()} threads, {given.device}, torch {torch.__version__}"
    )
    for name, value in speed.items():
        print(f"{name:24} {value:10,.0f} tokens/s")
    best = max(value for name, value in speed.items() if name != "mariotte")
    print(f"ratio to the quickest of lm-eval: {speed['mariotte'] / best:.2f}")
    print(f"largest difference of a document's loss: {apart:.1e}, relative")


if __name__ == "__main__":
    main()
