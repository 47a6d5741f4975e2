"""How the testbed's models were trained, and what was measured of them.

Shapes: B rows of a batch, T tokens of a row, V vocabulary, F facts.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mariotte.models.step import MANIFEST
from mariotte.testbed.world import ROW_TOKENS, SENTENCE_TOKENS, Fact, Row, World
from mariotte.testbed.zoo import RECORD, Specification, save_tokenizer, specification
from mariotte.training import cloze
from mariotte.training.loop import Progress, TrainState, causal_loss, train
from mariotte.training.schedule import ConstantThenLinear

TEST_ROWS = 512
TEST_SENTENCES = 2048
_SAVE_EVERY = 200  # steps; what a kill can cost
# The matrix of a BERT's head, before its last norm, is trained as those inside the blocks.
_BLOCK = re.compile(r"\.(layers|layer|block)\.\d+\.|\.predictions\.transform\.")


def build(shape: Specification) -> PreTrainedModel:
    """The untrained model of a specification: float32, seeded."""
    torch.manual_seed(shape.recipe.seed)
    if shape.family == "bert":
        return BertForMaskedLM(BertConfig(**shape.config()))
    if shape.family == "t5":
        return T5ForConditionalGeneration(T5Config(**shape.config()))
    if shape.family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape.config()))
    return LlamaForCausalLM(LlamaConfig(**shape.config()))


def muon_and_adamw(module: nn.Module, muon_rate: float, adamw_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases.

    AdamW alone leaves the 1.0M model worse than a third of its size: its learning rate, not its capacity.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def inside(name: str, p: nn.Parameter) -> bool:
        # The table of a T5's relative positions is an embedding.
        return p.ndim == 2 and _BLOCK.search(name) is not None and "relative_attention_bias" not in name

    hidden = [p for name, p in named if inside(name, p)]
    rest = [p for name, p in named if not inside(name, p)]
    return [
        torch.optim.Muon(hidden, lr=muon_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=adamw_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def token_losses(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """(B, T) -ln p of each token given those before, in nats, float32; zero for the first."""
    losses: list[Tensor] = []
    for start in range(0, len(tokens_BT), 64):
        rows_BT = tokens_BT[start : start + 64]
        logits_BTV = model(input_ids=rows_BT, use_cache=False).logits[:, :-1].float()
        nll_BT = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, 1:].flatten(), reduction="none")
        losses.append(nn.functional.pad(nll_BT.view(len(rows_BT), -1), (1, 0)))
    return torch.cat(losses)


def loss_and_floor(model: nn.Module, rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss of a model and the world's floor, in nats a token, on the complete sentences of the same rows."""
    losses_BT = token_losses(model, torch.tensor([row.ids for row in rows])).double().numpy()
    scored_BT = np.stack([row.scored for row in rows])
    floor = sum(sentence.nll for row in rows for sentence in row.sentences)
    return float(losses_BT[scored_BT].mean()), floor / int(scored_BT.sum())


@torch.no_grad()
def known(model: nn.Module, world: World, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether the likeliest next word of the whole vocabulary is the answer, for each prompt, ``<bos>`` before it."""
    id_of = {word: i for i, word in enumerate(world.vocabulary)}
    ids = [[0, *(id_of[word] for word in prompt.split())] for prompt in prompts]
    right = [False] * len(ids)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(ids):
        by_length.setdefault(len(prompt), []).append(i)
    for where in by_length.values():
        for start in range(0, len(where), 512):
            part = where[start : start + 512]
            logits_BTV = model(input_ids=torch.tensor([ids[i] for i in part]), use_cache=False).logits
            for i, best in zip(part, logits_BTV[:, -1].argmax(-1).tolist(), strict=True):
                right[i] = best == id_of[answers[i]]
    return right


def _fills_gaps(model: nn.Module) -> bool:
    """Whether a model fills gaps in sentences, instead of going on with text."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) in ("bert", "t5")


def facts_known(model: nn.Module, world: World, facts: Sequence[Fact]) -> dict[str, Any]:
    """Share of facts known through seen and through held-out patterns, overall and by quarter of popularity."""
    seen = [(fact, prompt) for fact in facts for prompt in fact.seen]
    heldout = [(fact, fact.heldout) for fact in facts]
    result: dict[str, Any] = {"n": len(facts)}
    for label, asked in (("seen", seen), ("heldout", heldout)):
        ask = cloze.known if _fills_gaps(model) else known
        right = ask(model, world, [prompt for _, prompt in asked], [fact.answer for fact, _ in asked])
        quarters: list[list[bool]] = [[], [], [], []]
        for (fact, _), r in zip(asked, right, strict=True):
            quarters[fact.popularity_quarter].append(r)
        result[label] = sum(right) / len(right)
        result[f"{label}_by_quarter"] = [sum(quarter) / len(quarter) if quarter else None for quarter in quarters]
    return result


def measure(model: nn.Module, world: World, n_rows: int) -> dict[str, Any]:
    """Loss against the floor on test rows (sentences, for a model that fills gaps), and facts known."""
    model.eval()
    if _fills_gaps(model):
        losses = cloze.loss_and_floor(model, world, world.sentences("all", "test", n_rows))
    else:
        rows = world.rows("all", "test", n_rows)
        loss, floor = loss_and_floor(model, rows)
        scored = int(sum(row.scored.sum() for row in rows))
        losses = {"test_rows": n_rows, "scored_tokens": scored, "loss": loss, "floor": floor}
    return {
        **losses,
        "facts": facts_known(model, world, world.facts()),
        "place_facts": facts_known(model, world, world.place_facts()),
    }


def train_model(
    name: str,
    out: Path,
    *,
    shape: Specification | None = None,
    compiled: bool = False,
    watch: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train a model of the testbed from nothing and write its checkpoint with its training record.

    A run that was killed goes on where its last saved state stands, in ``out/state``, and ends the same.

    Parameters
    ----------
    name : of the testbed's model
    out : folder of the checkpoint
    shape : to train instead of the testbed's own specification of that name
    compiled : through ``torch.compile``; faster where there is a C++ compiler, equal up to rounding
    watch : called after every step

    Returns
    -------
    the training record
    """
    shape = shape or specification(name)
    recipe = shape.recipe
    world = World()
    model = build(shape)
    state = TrainState(model, muon_and_adamw(model, recipe.muon_rate, recipe.adamw_rate), seed=recipe.seed)
    fills_gaps = _fills_gaps(model)
    steps = recipe.tokens // (recipe.batch * (SENTENCE_TOKENS if fills_gaps else ROW_TOKENS))
    schedule = ConstantThenLinear(steps=steps, decay=round((1 - recipe.constant) * steps))
    folder = out / "state"
    seconds_file = folder / "seconds.json"
    spent = 0.0
    if (folder / MANIFEST).is_file():
        state.load(folder)
        spent = float(json.loads(seconds_file.read_text(encoding="utf-8")))
    call = cast("Callable[..., Any]", torch.compile(model) if compiled else model)

    def batch(step: int) -> Tensor:
        if fills_gaps:
            return cloze.batch(world, step, recipe.batch)
        return torch.from_numpy(world.tokens("all", "train", recipe.batch, step * recipe.batch))

    def loss(_: nn.Module, tokens_BT: Tensor) -> Tensor:
        if fills_gaps:
            return cloze.cloze_loss(call, tokens_BT, shape.family, world)
        return causal_loss(call, tokens_BT)

    began = time.perf_counter()
    while state.step < steps:
        train(state, batch, schedule=schedule, until=min(steps, state.step + _SAVE_EVERY), loss=loss, watch=watch)
        folder.mkdir(parents=True, exist_ok=True)
        seconds_file.write_text(json.dumps(spent + time.perf_counter() - began), encoding="utf-8")
        state.save(folder)
    seconds = spent + time.perf_counter() - began

    # Measured as shipped: rounded to bf16, computed in float32.
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(out)
    save_tokenizer(out, shape.family)
    nn.Module.to(model, torch.float32)
    weights = out / "model.safetensors"
    record = {
        "name": shape.name,
        "family": shape.family,
        "n_params": shape.n_params,
        "recipe": asdict(recipe),
        "steps": steps,
        "world_seed": world.seed,
        "seconds": round(seconds, 1),
        "hardware": f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "compiled": compiled,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        **measure(model, world, TEST_SENTENCES if fills_gaps else TEST_ROWS),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    return record


def _processor() -> str:
    """Name of the processor, as Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
