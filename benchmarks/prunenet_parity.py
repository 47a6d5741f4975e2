"""PruneNet's policy training beside the published code: rewards in training and of the cuts, seed by seed.

python benchmarks/prunenet_parity.py MODEL [--reference CHECKOUT] [--published] [--data SHARED_DATA] [--seeds 5]

MODEL has llama's shape. CHECKOUT is a copy of github.com/LCS2-IIITD/PruneNet; its training loop, its slicing and its
reward run unchanged, in float32 (its float16 autocast is off) unless --published is given. SHARED_DATA, as in
stories260k.py, adds the test loss of every cut. A row of the table is one seed; the last rows are means and standard
deviations over the seeds that came so far. Widths are the published ones, int((1 - ratio) F).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import ks_2samp

from mariotte.compress.methods.prunenet import PruneNet
from mariotte.compress.methods.prunenet_random import PruneNetRandom
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Step, prepare_once

EPISODES = 20


class Run(NamedTuple):
    """Mean reward of all episodes, of the last five, and of the cut; the cut's test loss."""

    training: float
    late: float
    cut: float
    loss: float


def reward_of(model: Model, cut: Model) -> float:
    """Mean of 1 / KS over the blocks, by numpy and scipy, whoever made the cut."""
    pairs = zip(model.blocks, cut.blocks, strict=True)
    spectra = ([torch.linalg.svdvals(b.ffn[0].weight.detach().double()).numpy() for b in pair] for pair in pairs)
    return statistics.mean(1 / ks_2samp(*pair, method="asymp").statistic for pair in spectra)


def ours(step: Step, model: Model, ratio: float, seed: int, test: Callable[[Model], float]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        context = Context(dense=model, scratch=Path(folder), seed=seed)
        prepared = prepare_once(step, model, context, [ratio])
        cut = step.apply(model, prepared, ratio, context)
    (rewards,) = prepared.facts.get("rewards", {"": [float("nan")]}).values()
    return Run(statistics.mean(rewards), statistics.mean(rewards[-5:]), reward_of(model, cut), test(cut))


def reference_modules(checkout: Path) -> tuple[Any, Any]:
    """The published script and its functions; of slicegpt it needs a device and a logger."""
    config = types.ModuleType("slicegpt.config")
    config.config = types.SimpleNamespace(device=torch.device("cpu"))  # pyright: ignore[reportAttributeAccessIssue]
    package = types.ModuleType("slicegpt")
    package.utils = types.SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"slicegpt": package, "slicegpt.config": config}
    sys.path.insert(0, str(checkout / "prunenet"))
    script, functions = import_module("prunenet"), import_module("prunenet_utils")
    script.tqdm = lambda episodes: episodes
    return script, functions


def theirs(
    modules: tuple[Any, Any], model: Model, ratio: float, seed: int, test: Callable[[Model], float], published: bool
) -> Run:
    script, functions = modules
    rewards: list[float] = []

    def recorded(spectrum: torch.Tensor, weight: torch.Tensor) -> Any:
        rewards.append(functions._calculate_activation_reward(spectrum, weight))
        return rewards[-1]

    script._calculate_activation_reward = recorded
    arguments = argparse.Namespace(
        model_name="llama", compression_ratio=ratio, num_episodes=EPISODES, learning_rate_action=1e-3, use_kld=False
    )
    functions._set_seed(seed)
    policy = functions._get_action_model("llama", model.hf.config)
    spectra = {index: torch.svd(block.ffn[0].weight.data)[1] for index, block in enumerate(model.blocks)}
    cut = model.copy()
    autocast, save, result = torch.autocast, torch.save, float("nan")
    best: dict[str, torch.Tensor] = {}

    def keep(state: dict[str, torch.Tensor], _path: Path) -> None:
        best.update({name: value.detach().clone() for name, value in state.items()})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a gradient scaler without a GPU
        # It would write the best policy so far as a pickle, to be read again at once.
        torch.save = keep  # pyright: ignore[reportAttributeAccessIssue]
        if not published:
            torch.autocast = lambda **_: contextlib.nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            script._training(arguments, model.hf.base_model, policy, spectra, Path("policy"))
            policy.load_state_dict(best)
            script._prune_model(arguments, cut.hf.base_model, policy)
            result = reward_of(model, cut)
        except RuntimeError as error:
            # Its probabilities are no numbers any more: the rewards until then count, and there is no cut.
            if "probability tensor" not in str(error):
                raise
            print(f"ratio {ratio} seed {seed}: ended in episode {len(rewards) // len(model.blocks)}: {error}")
        finally:
            torch.autocast, torch.save = autocast, save
    late = rewards[-5 * len(model.blocks) :]
    finished = result == result
    return Run(statistics.mean(rewards), statistics.mean(late), result, test(cut) if finished else float("nan"))


def windows(data: Path, model: Model, window: int = 256, test: int = 200) -> torch.Tensor:
    """The last windows of the sample, as in stories260k.py."""
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // window * window].view(-1, window)[-test:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or testbed/NAME")
    parser.add_argument("--reference", type=Path, help="checkout of the published code")
    parser.add_argument("--published", action="store_true", help="run it with its float16 autocast")
    parser.add_argument("--data", type=Path, help="folder with tinystories/, for test losses")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    model = load(given.model)
    rows = None if given.data is None else windows(given.data, model)

    def test(cut: Model) -> float:
        return float("nan") if rows is None else float(token_nll(cut, rows, batch=8).mean())

    modules = None if given.reference is None else reference_modules(given.reference)
    print(f"{'ratio':>5} {'code':>16} {'seed':>5} {'training':>9} {'last 5':>9} {'cut':>9} {'loss':>7}")
    for ratio in given.ratios:
        neurons = model.shape.ffn
        # Rounded to the nearest, the same width as theirs.
        exact = 1 - int((1 - ratio) * neurons) / neurons
        steps: dict[str, Callable[[int], Run]] = {
            "prunenet": lambda seed, r=exact: ours(PruneNet(round_to=1, episodes=EPISODES), model, r, seed, test),
            "prunenet-random": lambda seed, r=exact: ours(PruneNetRandom(round_to=1), model, r, seed, test),
        }
        if modules is not None:
            steps["reference"] = lambda seed, r=ratio: theirs(modules, model, r, seed, test, given.published)
        for name, run in steps.items():
            runs = [run(seed) for seed in range(given.seeds)]
            for seed, found in enumerate(runs):
                show(ratio, name, str(seed), found)
            table = np.array(runs)
            finished = np.isfinite(table).sum(0).clip(min=2)
            corrected = finished / (finished - 1)
            show(ratio, name, "mean", Run(*mean(table)))
            show(ratio, name, "sd", Run(*mean((table - mean(table)) ** 2 * corrected) ** 0.5))


def mean(table: np.ndarray) -> np.ndarray:
    """Column by column, of the rows that have a number; none where no row has."""
    there = np.isfinite(table)
    return np.where(there.any(0), np.where(there, table, 0).sum(0) / there.sum(0).clip(min=1), np.nan)


def show(ratio: float, name: str, label: str, run: Run) -> None:
    training, late, cut, test = run
    print(f"{ratio:5} {name:>16} {label:>5} {training:9.4f} {late:9.4f} {cut:9.4f} {test:7.4f}", flush=True)


if __name__ == "__main__":
    main()
