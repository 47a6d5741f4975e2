"""What every step asks of a model's sizes: its family, its scopes, and amounts in whole parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from mariotte.architectures import FAMILIES, Architecture, Need, Shape


class Sizes(Protocol):
    """What is asked of a model: its family's entry and its sizes. Loaded models have them, and so do configs."""

    @property
    def entry(self) -> Architecture:
        """Of its family."""
        ...

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...


IRREGULAR = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2"),
    *("phi", "phi3", "falcon", "gpt2", "opt", "gpt_neox"),
)
"""Families for which there is a class of ours whose blocks have sizes of their own: `mariotte.models.irregular`."""


PARTS = {"all": {"attention", "ffn"}, "attention": {"attention"}, "ffn": {"ffn"}, "head": {"head"}}
"""What each scope covers: the head is no part of the blocks, and of no other scope."""


def refuse_by_family(
    model: Sizes, needs: Iterable[Need], *, mixtures: bool, cuts_widths: bool, scope: str
) -> str | None:
    """Why a step cannot work on a model, whatever else it may say.

    Parameters
    ----------
    needs : of the family; see `Architecture.lacking`
    mixtures : whether the step knows what to do with the MLPs of a mixture of experts
    cuts_widths : whether it takes rows and columns of matrices away, so that these must be whole
    scope : that it works on
    """
    if reason := model.entry.lacking(needs):
        return f"{reason}: take a model of another family, or magnitude, which works on all of them"
    if model.entry.experts and not mixtures and scope not in ("attention", "head"):
        return (
            f"needs one MLP a block, and {model.entry.model_type} is a mixture of experts: take experts, "
            "expert-ffn, shortgpt or magnitude"
        )
    if cuts_widths and model.shape.ranks is not None:
        return "needs whole matrices, and this model holds some as products of two: do it before svd-llm"
    return None


def refuse_irregular(model: Sizes) -> str | None:
    """Why blocks of `model` cannot get sizes of their own, in a clause without its end; None when they can."""
    if model.entry.model_type not in IRREGULAR:
        return f"needs a class for blocks of different sizes, and {model.entry.model_type} has none"
    return None


def refuse_counted_factors(model: Sizes) -> str | None:
    """Why neither hidden size nor heads of `model` can change, as its config checks one against the other; or None."""
    entry = model.entry
    if entry.head_dim or not FAMILIES[entry.model_type].head_dim:
        return None
    return (
        f"needs a config that states head_dim, and this {entry.model_type} counts the factors of its rotation "
        "against the hidden size over the heads: take ffn or shortgpt"
    )


def whole(amounts: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Amounts of parts in whole parameters that add up to `total`.

    Parameters
    ----------
    amounts : of each part, in [0, 1)
    sizes : parameters of each part
    total : what they come to; within the number of parts of sum(amounts · sizes)

    Returns
    -------
    Parameters of each part, at most one away from its amount: those with the largest remainders are rounded up
    """
    wanted = [amount * size for amount, size in zip(amounts, sizes, strict=True)]
    counts = [int(parameters) for parameters in wanted]
    missing = total - sum(counts)
    # Rounded before they are compared: of remainders that differ by float error the first goes up.
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-round(wanted[i] - counts[i], 6), i))
    possible = [i for i in by_remainder if counts[i] < sizes[i]]
    assert 0 <= missing <= len(possible), (missing, amounts, sizes, total)
    for i in possible[:missing]:
        counts[i] += 1
    return counts
