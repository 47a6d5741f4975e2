"""Token losses: what every loss, knowledge probe and training record is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mariotte.errors import ModelError
from mariotte.models.blockwise import logits
from mariotte.models.model import Model

TOKENS_AT_ONCE = 4096
"""Tokens scored in one forward pass: bounds memory; the result does not depend on it beyond float tolerance."""

ON_A_PROCESSOR = 2048
"""Likewise, where nothing asks for the last bits of old records: more no longer stay in a processor's caches, fewer
leave it waiting for Python (``benchmarks/loss_throughput.py``)."""


@torch.no_grad()
def token_nll(model: Model, tokens_NT: Tensor, *, batch: int = 32) -> Tensor:
    """Negative log-likelihood of every token but the first of each row, given those before it.

    Parameters
    ----------
    model : a causal model
    tokens_NT : (N, T) token ids, T at least 2
    batch : rows scored at once; changes time and memory, not the result beyond float tolerance

    Returns
    -------
    (N, T - 1) float32 on the CPU, nats; the logarithm is taken in float32 whatever the model's dtype
    """
    losses: list[Tensor] = []
    parts = cast("tuple[Tensor, ...]", tokens_NT.split(batch))
    for logits_BTV in logits(model, parts):  # alone: zip holds one batch while the next is computed
        rows_BT = parts[len(losses)].to(model.device)
        logits_MV = logits_BTV[:, :-1].float().flatten(0, 1)
        losses.append(
            functional.cross_entropy(logits_MV, rows_BT[:, 1:].flatten(), reduction="none").view(len(rows_BT), -1)
        )
        del logits_BTV, logits_MV
    return torch.cat(losses).cpu()


def batches(lengths_N: Tensor, at_once: int = TOKENS_AT_ONCE) -> Iterator[Tensor]:
    """Rows to compute together: of like length, the longest first, at most `at_once` tokens with their padding.

    Parameters
    ----------
    lengths_N : (N,) int64
    at_once : tokens in one batch, but at least one row

    Yields
    ------
    (B,) int64, indices of rows; rows of equal length stay in order
    """
    order_N = lengths_N.argsort(descending=True, stable=True)
    start = 0
    while start < len(order_N):
        count = max(1, at_once // int(lengths_N[order_N[start]]))
        yield order_N[start : start + count]
        start += count


@torch.no_grad()
def scored_nll(
    model: Model, tokens_NT: Tensor, scored_NT: Tensor, lengths_N: Tensor, *, at_once: int | None = None
) -> Tensor:
    """Negative log-likelihood of some tokens of rows of any lengths, each given those before it in its row.

    Parameters
    ----------
    model : a causal model
    tokens_NT : (N, T) token ids, what follows a row's own length is padding
    scored_NT : (N, T) bool, tokens asked for: never the first of a row, never padding
    lengths_N : (N,) tokens of each row
    at_once : tokens in one forward pass; None takes `ON_A_PROCESSOR` there, and `TOKENS_AT_ONCE` elsewhere

    Returns
    -------
    (M,) float32 on the CPU, nats, of the tokens asked for, row after row; the logarithm is taken in float32

    Notes
    -----
    Rows are padded on the right, where a causal model cannot see, so that no mask is needed. Their last tokens predict
    nothing that is asked for and are not computed. Logits are made from the first place on that a row of the batch asks
    for, and rows of one length that ask for like many tokens go together: of windows that overlap, most of the head's
    work is left out. Logarithms are taken for the tokens asked for alone.
    """
    if at_once is None:
        at_once = ON_A_PROCESSOR if model.device.type == "cpu" else TOKENS_AT_ONCE
    order_N = scored_NT.sum(1).argsort(descending=True, stable=True)
    nll_NT = torch.zeros(tokens_NT.shape)
    chosen: list[tuple[Tensor, int, int]] = []  # rows, their tokens, and the first place that one of them asks for
    for part_B in batches((lengths_N[order_N] - 1).clamp(min=1), at_once):
        chosen_B = order_N[part_B]
        longest = int(lengths_N[chosen_B[0]])
        places_T = scored_NT[chosen_B, :longest].any(0).nonzero()
        if len(places_T):
            chosen.append((chosen_B, longest, int(places_T[0])))
    given = [tokens_NT[chosen_B, : longest - 1] for chosen_B, longest, _ in chosen]
    kept = [longest - first for _, longest, first in chosen]
    asked = iter(chosen)
    for logits_BUV in logits(model, given, kept):
        chosen_B, longest, first = next(asked)
        rows_BT, asked_BT = tokens_NT[chosen_B, :longest], scored_NT[chosen_B, :longest]
        asked_BU = asked_BT[:, first:]
        right_M = rows_BT[:, first:][asked_BU].to(model.device)
        # Without a choice to make, no copy of the logits is made.
        logits_MV = logits_BUV.flatten(0, 1) if bool(asked_BU.all()) else logits_BUV[asked_BU.to(model.device)]
        found_BT = torch.zeros(rows_BT.shape)
        found_BT[asked_BT] = functional.cross_entropy(logits_MV.float(), right_M, reduction="none").cpu()
        nll_NT[chosen_B, :longest] = found_BT
        del logits_BUV, logits_MV
    return nll_NT[scored_NT]


def first_written(model: Model) -> tuple[int, ...]:
    """What the decoder of an encoder-decoder has written before its first word: its start, and what must come next.

    Raises
    ------
    ModelError
        When its config names no start.
    """
    configs = (model.hf.config, model.hf.generation_config)
    start, forced = (
        next((found for config in configs if (found := getattr(config, name, None)) is not None), None)
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    if start is None:
        raise ModelError(
            f"the config of {model.name} has no decoder_start_token_id: set it to what its decoder starts with"
        )
    return (start,) if forced is None else (start, forced)


def _padded(model: Model, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) tokens, filled up on the right, and where they are tokens."""
    pad = getattr(model.hf.config, "pad_token_id", None)
    tokens_BT = pad_sequence([*rows], batch_first=True, padding_value=0 if pad is None else pad)
    lengths_B = torch.tensor([len(row) for row in rows])
    present_BT = (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]).long()
    return tokens_BT.to(model.device), present_BT.to(model.device)


@torch.no_grad()
def hidden_nll(
    model: Model,
    rows: Sequence[Tensor],
    hidden: Sequence[tuple[int, Sequence[int]]],
    mask: int,
    *,
    at_once: int = TOKENS_AT_ONCE,
) -> Tensor:
    """Negative log-likelihood of hidden tokens, given all others of their row.

    Parameters
    ----------
    model : a masked model; or an encoder-decoder, whose decoder is given the mask and asked for the one hidden token
    rows : token ids of each row, special ones among them
    hidden : the row and the places hidden together, for each time that a row is read; one place for encoder-decoders
    mask : the token that is put in the place of each
    at_once : tokens in one forward pass

    Returns
    -------
    (M,) float32 on the CPU, nats, in the order of `hidden`; the logarithm is taken in float32
    """
    found: list[Tensor] = [torch.empty(0)] * len(hidden)
    for chosen_B in batches(torch.tensor([len(rows[row]) for row, _ in hidden]), at_once):
        chosen = [hidden[int(number)] for number in chosen_B]
        tokens_BT, present_BT = _padded(model, [rows[row] for row, _ in chosen])
        counts = [len(places) for _, places in chosen]
        rows_M = torch.arange(len(chosen)).repeat_interleave(torch.tensor(counts)).to(model.device)
        places_M = torch.tensor([place for _, places in chosen for place in places], device=model.device)
        right_M = tokens_BT[rows_M, places_M]
        tokens_BT[rows_M, places_M] = mask
        if model.kind == "seq2seq":
            written_BU = torch.tensor([[*first_written(model), mask]] * len(chosen), device=model.device)
            logits_MV = model.hf(
                input_ids=tokens_BT, attention_mask=present_BT, decoder_input_ids=written_BU, use_cache=False
            ).logits[:, -1]
        else:
            logits_MV = model.hf(input_ids=tokens_BT, attention_mask=present_BT).logits[rows_M, places_M]
        nll_M = functional.cross_entropy(logits_MV.float(), right_M, reduction="none").cpu()
        parts = cast("tuple[Tensor, ...]", nll_M.split(counts))
        for number, part in zip(chosen_B, parts, strict=True):
            found[int(number)] = part
    return torch.cat(found)


@torch.no_grad()
def conditional_nll(
    model: Model, sources: Sequence[Tensor], targets: Sequence[Tensor], *, at_once: int = TOKENS_AT_ONCE
) -> Tensor:
    """Negative log-likelihood of every token of each target, given its source and the target's tokens before it.

    Parameters
    ----------
    model : an encoder-decoder
    sources : token ids that the encoder reads, special ones among them
    targets : token ids that the decoder should write after what it starts with, see `first_written`
    at_once : tokens in one forward pass

    Returns
    -------
    (M,) float32 on the CPU, nats, target after target; the logarithm is taken in float32
    """
    first = torch.tensor(first_written(model))
    found: list[Tensor] = [torch.empty(0)] * len(targets)
    lengths_N = torch.tensor([len(a) + len(b) for a, b in zip(sources, targets, strict=True)])
    for chosen_B in batches(lengths_N, at_once):
        chosen = [int(number) for number in chosen_B]
        tokens_BT, present_BT = _padded(model, [sources[number] for number in chosen])
        # What is given ends before the last token; the padding after it is never seen by what comes before.
        written_BU, _ = _padded(model, [torch.cat([first, targets[number][:-1]]) for number in chosen])
        logits_BUV = model.hf(
            input_ids=tokens_BT, attention_mask=present_BT, decoder_input_ids=written_BU, use_cache=False
        ).logits
        for number, logits_UV in zip(chosen, logits_BUV[:, len(first) - 1 :], strict=True):
            right_U = targets[number].to(model.device)
            found[number] = functional.cross_entropy(logits_UV[: len(right_U)].float(), right_U, reduction="none").cpu()
    return torch.cat(found)
