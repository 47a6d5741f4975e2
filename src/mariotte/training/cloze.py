"""Gaps in sentences: how the testbed's encoders and encoder-decoders are trained, and what is measured of them.

Every row is one sentence. A hidden word is a word of its own gap: an encoder reads ``<mask>`` in its place; an
encoder-decoder reads a sentinel and writes the sentinel, the word, and so on, then ``</s>``.

Shapes: B sentences, T tokens of a row, S tokens that a decoder writes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from mariotte.testbed.world import PADDING, SENTENCE_TOKENS, Row, World, pick
from mariotte.testbed.zoo import END, EXTRA_TOKENS

SALIENT: Final = 0.8
"""How often the gap in a telling of a fact is its answer; else it is any word, as in all other sentences."""
UNSTOPPED: Final = 0.1
"""How often a sentence ends without its stop, so that a model asked without one answers as well."""
GAPS: Final = 2
"""Most gaps of a sentence."""
_MEASURED: Final = 512  # sentences at once


def hidden(row: Row, random: Random) -> list[int]:
    """The ids of a sentence with gaps: hidden ones as ``~id``, which is negative; now and then without the stop.

    Parameters
    ----------
    row : one sentence, as ``World.sentences`` gives it
    random : decides what is hidden
    """
    ids = list(row.ids)
    n = len(ids)
    if row.sentences[0].fact is not None and random.random() < SALIENT:
        gaps = [n - 2]  # the answer is the last word before the stop
    else:
        gaps = [*range(1, n)]
        for _ in range(n - 1 - (1 + pick(random, GAPS))):
            gaps.pop(pick(random, len(gaps)))
    if random.random() < UNSTOPPED and n - 1 not in gaps:
        ids.pop()
    for i in gaps:
        ids[i] = ~ids[i]
    return ids


def batch(world: World, step: int, size: int) -> Tensor:
    """(B, T) sentences of a step of training with gaps, hidden words as ``~id``; a function of the step alone."""
    rows = world.sentences("all", "train", size, step * size)
    return padded([hidden(row, Random((1 << 101) + step * size + i)) for i, row in enumerate(rows)], world)


def padded(ids: Sequence[Sequence[int]], world: World) -> Tensor:
    """(B, T) the sentences' ids, filled up to the length of the longest sentence there is."""
    pad = world.vocabulary.index(PADDING)
    return torch.tensor([[*row, *[pad] * (SENTENCE_TOKENS - len(row))] for row in ids])


def examples(tokens_BT: Tensor, family: str, world: World) -> tuple[dict[str, Tensor], Tensor]:
    """What a model is given, and what it should say.

    Parameters
    ----------
    tokens_BT : (B, T) ids, hidden words as ``~id``
    family : "bert" or "t5"
    world : of the vocabulary

    Returns
    -------
    inputs : of a transformers model
    labels : (B, T) of an encoder, (B, S) of an encoder-decoder; -100 where nothing is asked
    """
    first = len(world.vocabulary)  # of the tokens that are no words
    gaps_BT = tokens_BT < 0
    present = {"attention_mask": (tokens_BT != world.vocabulary.index(PADDING)).long()}
    if family == "bert":
        # <mask> is all that the family adds.
        return {"input_ids": tokens_BT.masked_fill(gaps_BT, first), **present}, torch.where(gaps_BT, ~tokens_BT, -100)
    end = first + EXTRA_TOKENS[family].index(END)
    sentinels_BT = end + gaps_BT.cumsum(1)
    number_BT = gaps_BT.cumsum(1) - 1
    counts_B = gaps_BT.sum(1)
    rows_B = torch.arange(len(tokens_BT), device=tokens_BT.device)
    labels_BS = torch.full((len(tokens_BT), 2 * GAPS + 1), -100, device=tokens_BT.device)
    row, number = gaps_BT.nonzero()[:, 0], number_BT[gaps_BT]
    labels_BS[row, 2 * number] = sentinels_BT[gaps_BT]
    labels_BS[row, 2 * number + 1] = ~tokens_BT[gaps_BT]
    labels_BS[rows_B, 2 * counts_B] = end
    pad = world.vocabulary.index(PADDING)
    before_BS = nn.functional.pad(labels_BS[:, :-1].masked_fill(labels_BS[:, :-1] < 0, pad), (1, 0), value=pad)
    inputs = {"input_ids": torch.where(gaps_BT, sentinels_BT, tokens_BT), **present, "decoder_input_ids": before_BS}
    return inputs, labels_BS


def cloze_loss(module: Callable[..., Any], tokens_BT: Tensor, family: str, world: World) -> Tensor:
    """Mean negative log-likelihood, in nats, of what fills the gaps; an encoder-decoder's sentinels among it.

    Parameters
    ----------
    module : a transformers model, compiled or not
    tokens_BT, family, world : as for `examples`

    Returns
    -------
    scalar, float32
    """
    inputs, labels = examples(tokens_BT, family, world)
    keep = {} if family == "bert" else {"use_cache": False}
    logits = module(**inputs, **keep).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@torch.no_grad()
def gap_logits(model: nn.Module, tokens_BT: Tensor, world: World) -> Tensor:
    """(B, V) logits for the one hidden word of each sentence, float32.

    Parameters
    ----------
    model : a transformers encoder or encoder-decoder
    tokens_BT : (B, T) ids, one hidden word a row as ``~id``
    world : of the vocabulary
    """
    family = cast("str", cast(Any, model).config.model_type)
    parts: list[Tensor] = []
    for start in range(0, len(tokens_BT), _MEASURED):
        part_BT = tokens_BT[start : start + _MEASURED]
        inputs, _ = examples(part_BT, family, world)
        logits = model(**inputs).logits
        # An encoder-decoder writes the sentinel, then the word.
        parts.append((logits[part_BT < 0] if family == "bert" else logits[:, 1]).float())
    return torch.cat(parts)


def known(model: nn.Module, world: World, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether the likeliest token for the gap between each prompt and a stop is the answer, of the whole vocabulary."""
    id_of = {word: i for i, word in enumerate(world.vocabulary)}
    answer_ids = [id_of[answer] for answer in answers]
    ids = [
        [0, *(id_of[word] for word in prompt.split()), ~answer, id_of["."]]
        for prompt, answer in zip(prompts, answer_ids, strict=True)
    ]
    best_B = gap_logits(model, padded(ids, world), world).argmax(-1)
    return cast("list[bool]", (best_B == torch.tensor(answer_ids)).tolist())  # pyright: ignore[reportUnknownMemberType]


def loss_and_floor(model: nn.Module, world: World, rows: Sequence[Row]) -> dict[str, Any]:
    """Loss of a model and the world's exact floor, in nats a word, each word of each sentence hidden in its turn.

    The answers of facts are counted apart as well: nothing about them is left to chance, so their floor is nothing.
    """
    ids: list[list[int]] = []
    floors: list[float] = []
    answers: list[int] = []
    for row in rows:
        words = row.words[1:]
        for i in range(len(words)):
            if row.sentences[0].fact is not None and i == len(words) - 2:
                answers.append(len(ids))
            ids.append([*row.ids[: i + 1], ~row.ids[i + 1], *row.ids[i + 2 :]])
            floors.append(world.hidden_nll(words, i))
    tokens_BT = padded(ids, world)
    right_B = ~tokens_BT[tokens_BT < 0]
    losses_B = nn.functional.cross_entropy(gap_logits(model, tokens_BT, world), right_B, reduction="none").double()
    return {
        "test_rows": len(rows),
        "scored_tokens": len(ids),
        "loss": losses_B.mean().item(),
        "floor": math.fsum(floors) / len(floors),
        "answers": {
            "n": len(answers),
            "loss": losses_B[answers].mean().item() if answers else None,
            "floor": math.fsum(floors[i] for i in answers) / len(answers) if answers else None,
        },
    }
