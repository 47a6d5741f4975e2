"""Items a second of the knowledge measure beside lm-eval's loop: one model, the same items, one run.

    python benchmarks/knowledge_throughput.py /data/models/stories260K --data /data --relation P103 --facts 100

An item is one fact with one candidate answer: its log-likelihood after the fact's prompt. lm-eval gets them as requests
``(prompt, candidate)`` in its own batches (what ``HFLM.loglikelihood`` runs); the measure asks each fact with all
candidates of its relation. Both are timed by the clock and by the processor's time of this process, which other work on
the machine changes less, in turns, and the fastest turn of each counts; the largest difference between their numbers is
printed too.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from mariotte.evaluate import cloze, lama
from mariotte.evaluate.lama import Questions
from mariotte.models.load import load
from mariotte.models.model import Model


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `run` gives, with its seconds by the clock and of the processor."""
    wall, own = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - own


def harness(model: Model, questions: Questions, batch: int) -> Callable[[], list[float]]:
    """lm-eval's loop over every prompt with every candidate, given the same tokens as the measure."""
    lm = HFLM(pretrained=model.hf, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch)
    # A request is a pair of texts, which only names it, and their tokens.
    requests = [
        ((f"prompt {i}", f" answer {j}"), [*prompt.tokens], [*answer])
        for i, prompt in enumerate(questions.main.prompts)
        for j, answer in enumerate(questions.main.tokens)
    ]
    return lambda: [value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="holds lama; by default MARIOTTE_DATA")
    parser.add_argument("--relation", default="P103")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="lm-eval's rows in one forward pass")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.data is not None:
        os.environ["MARIOTTE_DATA"] = str(given.data)
    torch.set_num_threads(1)
    model = load(given.model)
    asked = lama.Asked(
        subsets=("trex",),
        relations=(given.relation,),
        facts=given.facts,
        seed=0,
        candidates="relation",
        per_token=False,
        paraphrases=0,
        every=False,
    )
    questions = lama.plan(model, asked).questions[0]
    items = len(questions.ids) * len(questions.answers)
    theirs = harness(model, questions, given.batch)
    best = {"mariotte": (float("inf"), float("inf")), "lm-eval": (float("inf"), float("inf"))}
    numbers: dict[str, torch.Tensor] = {}
    for _ in range(given.turns):
        for name, run in (
            ("mariotte", lambda: cloze.log_likelihoods(model, questions.main.prompts, questions.main.tokens)[0]),
            ("lm-eval", theirs),
        ):
            found, wall, own = timed(run)
            numbers[name] = torch.as_tensor(found, dtype=torch.float64).flatten()
            best[name] = (min(best[name][0], wall), min(best[name][1], own))
    result: dict[str, Any] = {
        "model": given.model,
        "relation": given.relation,
        "facts": len(questions.ids),
        "candidates": len(questions.answers),
        "items": items,
        "lm_eval_batch": given.batch,
    }
    for name, (wall, own) in best.items():
        result |= {f"{name}_items_per_s": items / wall, f"{name}_items_per_cpu_s": items / own}
    result["ratio"] = best["lm-eval"][0] / best["mariotte"][0]
    result["cpu_ratio"] = best["lm-eval"][1] / best["mariotte"][1]
    result["largest_difference_nats"] = float((numbers["mariotte"] - numbers["lm-eval"]).abs().max())
    if given.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}")


if __name__ == "__main__":
    main()
