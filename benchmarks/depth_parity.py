"""SLEB and LaCo: our orders and merges beside those of the authors' code, on the same model and tokens.

python benchmarks/depth_parity.py SHARED_DATA SLEB_CHECKOUT LACO_CHECKOUT [MODEL ...]

SHARED_DATA holds models/stories260K and tinystories/tinystories_sample.txt; the first 32 windows of 128 tokens are
used, of the testbed's text 64 of 64. The checkouts are of https://github.com/jiwonsong-dev/SLEB and
https://github.com/yangyifei729/LaCo. MODEL is stories260K or the name of a testbed model.

SLEB: its own ``sleb.sleb`` is run, from the choice of the text to the order that it prints. Replaced around it: what
loads the model and the text, the device, and ``block_replace``, whose copy of Llama's block is that of another
transformers; a block that is turned off hands on what it is given, as there.

LaCo: the cells of its notebook are run as they are, from the functions to the loop, with its settings replaced. Its
tokenizer is given rows of token ids for sentences.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from stand_ins import stand_ins

from mariotte.compress.methods.laco import LaCo
from mariotte.compress.methods.sleb import SLEB
from mariotte.data import corpora, tokens
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context, prepare_once

WINDOW, ROWS = 128, 32


def case(name: str, data: Path) -> tuple[Model, torch.Tensor]:
    """A model and its calibration rows."""
    if name != "stories260K":
        model = load(f"testbed/{name}")
        return model, tokens.blocks(corpora.find("testbed/all"), "calibration", model.tokenizer, 64, 2 * ROWS)
    model = load(data / "models" / name)
    assert model.tokenizer is not None
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return model, ids[: ROWS * WINDOW].view(ROWS, WINDOW)


class Switched(torch.nn.Module):
    """A block that can be turned off."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block, self.off = block, False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: torch.Tensor, **settings: Any) -> torch.Tensor:
        """What it is given, when off."""
        return hidden_states if self.off else self.block(hidden_states, **settings)


def reference_sleb(checkout: Path, model: Model, tokens_NT: torch.Tensor, count: int) -> list[int]:
    """The order that the authors' code prints."""
    # Of these modules ``sleb`` uses before it prints its order only what is put in their place below; the command line
    # and the tests of what is left, which `eval_ppl` asks for, are None: they would raise, and change no order.
    unused = {
        "fire": (),
        "utils.data_utils": (),
        "utils.onoff_utils.onoff": ("turn_off", "turn_on", "block_replace"),
        "utils.block_remove": ("block_remove",),
        "utils.eval_utils": ("load_and_eval_ppl", "eval_zero_shot"),
    }
    sys.path.insert(0, str(checkout))
    with stand_ins(unused):
        import sleb as theirs  # pyright: ignore[reportMissingImports]

    hf: Any = copy.deepcopy(model.hf)
    hf.seqlen, hf.name = tokens_NT.shape[1], model.name
    hf.model.layers = torch.nn.ModuleList([Switched(layer) for layer in hf.model.layers])
    own_loss = theirs.get_loss
    theirs.get_llm = lambda _name: hf
    theirs.block_replace = lambda given: given
    theirs.get_trainloaders = lambda *_a, **_k: types.SimpleNamespace(input_ids=tokens_NT.reshape(1, -1))
    theirs.get_loss = lambda given, text, **_: own_loss(given, text, bs=1, device=torch.device("cpu"))
    theirs.turn_off = lambda given, index: setattr(given.model.layers[index], "off", True)
    theirs.turn_on = lambda given, index: setattr(given.model.layers[index], "off", False)
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        theirs.sleb(
            model.name, len(model.blocks), count, 1, 1, nsamples=len(tokens_NT), result_folder=folder, eval_ppl=False
        )
    return json.loads(re.findall(r"Block Removal Order: (\[.*\])", printed.getvalue())[-1])


def reference_laco(
    checkout: Path, model: Model, tokens_NT: torch.Tensor, together: int, apart: int, threshold: float
) -> Any:
    """The transformers model that the authors' notebook ends with."""
    notebook = json.loads((checkout / "laco_llama-13b.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    room: dict[str, Any] = {"llama_13B": copy.deepcopy(model.hf)}
    room["llama_13B"].config.use_cache = False  # today's caches count blocks, and the notebook does not count them anew
    room["tokenizer"] = lambda row, **_: {"input_ids": row[None]}
    for cell in cells:
        if "from_pretrained" in cell:
            continue
        if cell.startswith("INTERVAL"):
            room |= {"INTERVAL": apart, "MERGE_LAYERS": together, "THRESHOLD": threshold, "LOWEST_LAY": 0}
            room["HIGHEST_LAY"] = len(model.blocks) - 1
            continue
        if "while lay" in cell:
            cell = re.sub(r"en_wiki_selected = \[.*?\]\n", "", cell, flags=re.S)
            room["en_wiki_selected"] = list(tokens_NT)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(cell, room)  # the notebook of the checkout that was named
    return room["llama_13B_copy_to_compress"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("sleb", type=Path)
    parser.add_argument("laco", type=Path)
    parser.add_argument("models", nargs="*", default=["stories260K"])
    given = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32")
    for name in given.models:
        model, tokens_NT = case(name, given.data)
        layers = len(model.blocks)
        print(f"\n{name}: {layers} blocks, {tokens_NT.numel():,} tokens")
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(dense=model, scratch=Path(scratch), calibration=tokens_NT)
            order = prepare_once(SLEB(first=1, last=1), model, context, [0.99]).facts["order"]
        print(f"sleb, ours {order}, reference {reference_sleb(given.sleb, model, tokens_NT, layers - 2)}")
        for together, apart, threshold in ((2, 1, 0.8), (2, 2, 0.5), (3, 1, 0.7), (3, 2, 0.3), (4, 2, -1.0)):
            theirs = reference_laco(given.laco, model, tokens_NT, together, apart, threshold)
            left = len(theirs.model.layers)
            step = LaCo(together=together, apart=apart, threshold=threshold, rule="last")
            with tempfile.TemporaryDirectory() as scratch:
                context = Context(dense=model, scratch=Path(scratch), calibration=tokens_NT)
                amount = 1 - left / layers
                ours = step.apply(model, prepare_once(step, model, context, [amount]), amount, context)
            difference = (ours.logits(tokens_NT[:8]) - theirs(input_ids=tokens_NT[:8]).logits).abs().max()
            print(
                f"laco, {together} together, {apart} apart, threshold {threshold}: the reference leaves {left} blocks, "
                f"largest difference of logits {float(difference):.1e}"
            )


if __name__ == "__main__":
    main()
