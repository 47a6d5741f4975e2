"""``mariotte testbed``: the models that come with the package, and how each is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mariotte.cli.console import duration, print_json, print_table, progress, say
from mariotte.errors import ModelError

__all__ = ["testbed"]

testbed = typer.Typer(
    help="Show the models that come with the package, or train one of them anew.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@testbed.command()
def show(
    name: Annotated[str | None, typer.Argument(help="One model; all of them when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole training records as JSON.")] = False,
) -> None:
    """Show what the models of the testbed are and know: loss, the floor that no model can beat, facts.

    Facts are known when the likeliest word of the whole vocabulary is the answer: the next word for decoders, the word
    in the gap for encoders and encoder-decoders, whose loss is that of each word of a sentence hidden in its turn.
    "seen" asks in the patterns in which training text told the fact, "held out" in one in which it told other people's
    facts only. q1 is the most popular quarter of the people, q4 the least.
    """
    from mariotte.testbed.zoo import CLOZE_NAMES, NAMES, shipped, training_record

    # Where nothing is shipped, the first name is answered with how to make its weights.
    records = [training_record(each) for each in ((name,) if name else shipped() or NAMES)]
    if as_json:
        print_json(records[0] if name else records)
        return
    causal = [record for record in records if record["name"] not in CLOZE_NAMES]
    cloze = [record for record in records if record["name"] in CLOZE_NAMES]
    for title, part in (
        ("Loss in nats a token, on the same test rows as the floor", causal),
        ("Loss in nats a hidden word, on the same test sentences as the floor", cloze),
    ):
        if part:
            columns = ["model", "parameters", "tokens", "trained in", "loss", "floor", "excess"]
            print_table(title, columns, [_trained(record) for record in part])
    print_table(
        f"Facts known, of {records[0]['facts']['n']:,} about people",
        ["model", "asked in patterns", "all", "q1", "q2", "q3", "q4"],
        [
            [f"testbed/{record['name']}", label, *_shares(record["facts"], key)]
            for record in records
            for key, label in (("seen", "seen"), ("heldout", "held out"))
        ],
    )


def _trained(record: dict[str, Any]) -> list[object]:
    return [
        f"testbed/{record['name']}",
        f"{record['n_params']:,}",
        f"{record['recipe']['tokens']:,}",
        duration(record["seconds"]),
        record["loss"],
        record["floor"],
        record["loss"] - record["floor"],
    ]


def _shares(facts: dict[str, Any], key: str) -> list[str]:
    return [f"{share:.1%}" for share in (facts[key], *facts[f"{key}_by_quarter"])]


@testbed.command()
def train(
    name: Annotated[str, typer.Argument(help="Which model, such as qwen2-1m.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the checkpoint; default: ./testbed-NAME.")
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Do without torch.compile, which needs a C++ compiler.")
    ] = False,
) -> None:
    """Train a model of the testbed from nothing, as the one that comes with the package was.

    Takes minutes on one core. A run that was stopped goes on from its last saved state when the command is given
    again. Equal software on equal hardware gives equal weights; elsewhere they differ as rounding does.
    """
    import shutil

    from mariotte.testbed.zoo import RECORD, specification

    shape = specification(name)
    folder = out or Path(f"testbed-{shape.name}")
    if (folder / RECORD).exists():
        raise ModelError(f"{folder} holds a trained model already; remove it or choose another folder with --out")

    import torch

    from mariotte.training.loop import Progress
    from mariotte.training.zoo import train_model

    # One thread: on shared machines two that wait for each other are several times slower than one.
    torch.set_num_threads(1)
    with progress(shape.name, shape.recipe.tokens) as update:

        def watch(step: Progress) -> None:
            update(completed=step.tokens, text=f"loss {step.loss:.3f}")

        record = train_model(shape.name, folder, compiled=not eager and shutil.which("g++") is not None, watch=watch)
    facts = record["facts"]
    say(
        f"{folder}: loss {record['loss']:.3f} (floor {record['floor']:.3f}), "
        f"{facts['seen']:.1%} of facts known in seen patterns, {facts['heldout']:.1%} in held-out ones"
    )
