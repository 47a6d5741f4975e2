"""Feed-forward neurons chosen by a policy that learns to keep a matrix's spectrum.

Shapes: D model width, F neurons of a block, K neurons kept, S singular values of a matrix, L blocks.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from mariotte.accounting import check_round_to
from mariotte.architectures import Need
from mariotte.compress.neurons import (
    keep_neurons,
    neuron_rows,
    removed_with_neurons,
)
from mariotte.compress.surgery import cut_width
from mariotte.cuts.neurons import neuron_width, refuse_unequal_widths
from mariotte.errors import ChainError, DataError
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["PruneNet"]

EQUAL_SPECTRA = 99_999.0
"""The published code's reward for a cut that leaves the distribution of singular values as it is."""

SHARED = "shared"
"""In the key of what one policy does at all widths; else a width is there."""


def singular_values(weight_OI: Tensor) -> Tensor:
    """The singular values of a matrix, rising.

    Parameters
    ----------
    weight_OI : any floating dtype

    Returns
    -------
    (min(O, I),) float64

    Notes
    -----
    The roots of the eigenvalues of the smaller of W Wᵀ and Wᵀ W, which is several times faster than a decomposition of
    a tall W. float64, because squaring W squares its condition; what is left of a value below 1e-8 to 1e-6 of the
    largest (rising with the size) is rounding, and counts as zero: rows that are zero would else give values in an
    order of chance.
    """
    wide_OI = weight_OI.double()
    gram_SS = wide_OI @ wide_OI.T if wide_OI.shape[0] <= wide_OI.shape[1] else wide_OI.T @ wide_OI
    energy_S = cast(Tensor, torch.linalg.eigvalsh(gram_SS))
    floor = energy_S[-1] * len(energy_S) * torch.finfo(torch.float64).eps
    return torch.where(energy_S > floor, energy_S, 0.0).sqrt()


def ks_distance(first_S: Tensor, second_S: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two samples: the largest difference of their empirical distributions.

    Parameters
    ----------
    first_S, second_S : sorted, rising; they need not be equally many

    Notes
    -----
    The statistic of ``scipy.stats.ks_2samp``: distributions are compared at every value of either sample, its own ties
    included.
    """
    both = torch.cat([first_S, second_S])
    shares = [
        torch.searchsorted(sample, both, right=True).double() / len(sample)
        for sample in (first_S.contiguous(), second_S.contiguous())
    ]
    return float((shares[0] - shares[1]).abs().max())


def reward(distance: float) -> float:
    """What the policy is paid for a cut at this distance from the full spectrum."""
    return 1 / distance if distance else EQUAL_SPECTRA


class Policy(nn.Module):
    """Scores the rows of a matrix: sigmoid((W Pᵀ + b) s) is the chance that a row is worth keeping.

    Parameters
    ----------
    hidden, neurons : D and F
    generator : of the first values: P and b uniform within 1/sqrt(D), s uniform in [0, 1)
    """

    def __init__(self, hidden: int, neurons: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = hidden**-0.5
        self.projection = nn.Parameter((2 * torch.rand(neurons, hidden, generator=generator) - 1) * bound)
        self.bias = nn.Parameter((2 * torch.rand(neurons, generator=generator) - 1) * bound)
        self.scores = nn.Parameter(torch.rand(neurons, generator=generator))

    @override
    def forward(self, weight_FD: Tensor) -> Tensor:
        """The rows' log-odds, (F,) float32."""
        # (W Pᵀ + b) s = W (Pᵀ s) + b s: F D operations where the published order of the same products takes F² D.
        return weight_FD.float() @ (self.projection.T @ self.scores) + self.bias @ self.scores


def log_keep(logit_F: Tensor, generator: torch.Generator) -> Tensor:
    """Logarithms of keep probabilities, (F,): Gumbel-sigmoid samples at temperature 1 around the policy's log-odds."""
    uniform_F = torch.rand(len(logit_F), generator=generator, dtype=torch.float64)
    noise_F = uniform_F.clamp_(min=torch.finfo(torch.float64).tiny).logit().to(logit_F)
    return functional.logsigmoid(logit_F + noise_F)


def drawn(log_keep_F: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in the order in which they are drawn without replacement, each with its weight, (F,) int64.

    Notes
    -----
    The largest of log p + Gumbel noise is a draw with probabilities p, the next one a draw from the rest, and so on:
    the first K are what ``torch.multinomial(p, K)`` would give, for every K at once.
    """
    exponential_F = torch.empty(len(log_keep_F), dtype=torch.float64).exponential_(generator=generator)
    return (log_keep_F.double() - exponential_F.log().to(log_keep_F.device)).argsort(descending=True, stable=True)


def trained(
    weights: Sequence[Tensor],
    spectra: Sequence[Tensor],
    width: int,
    generator: torch.Generator,
    *,
    episodes: int,
    learning_rate: float,
    discount: float,
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[Policy, list[float]]:
    """A policy trained by REINFORCE to cut these matrices to `width` rows.

    Parameters
    ----------
    weights : L matrices, (F, D)
    spectra : L of their singular values, rising
    width : K, rows kept of each
    generator : of everything random
    episodes, learning_rate, discount : as the fields of `PruneNet`
    progress : called with the share of episodes done

    Returns
    -------
    The policy after the episode with the largest sum of rewards, and the mean reward of each episode.

    Notes
    -----
    Every episode cuts all matrices with one policy, then takes a step of AdamW for each, with the loss
    -discountⁱ rᵢ Σ log p over the rows kept of the i-th, p drawn anew.
    """
    neurons, hidden = weights[0].shape
    policy = Policy(hidden, neurons, generator).to(weights[0].device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    best, best_total, means = policy, 0.0, list[float]()
    for episode in range(episodes):
        actions: list[Tensor] = []
        rewards: list[float] = []
        for weight_FD, spectrum_S in zip(weights, spectra, strict=True):
            with torch.no_grad():
                kept_K = drawn(log_keep(policy(weight_FD), generator), generator)[:width]
                rewards.append(reward(ks_distance(spectrum_S, singular_values(weight_FD[kept_K]))))
            actions.append(kept_K)
        for index, (weight_FD, kept_K) in enumerate(zip(weights, actions, strict=True)):
            with torch.enable_grad():
                log_keep_F = log_keep(policy(weight_FD), generator)
                loss = -log_keep_F[kept_K].sum() * (discount**index * rewards[index])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        means.append(sum(rewards) / len(rewards))
        # After its steps, as published: what is kept is what the best episode taught, not what played it.
        if sum(rewards) > best_total:
            best, best_total = copy.deepcopy(policy), sum(rewards)
        progress((episode + 1) / episodes)
    return best, means


@dataclass(frozen=True, kw_only=True)
class PruneNet(Step):
    """Remove the same number of feed-forward neurons from each block, drawn by a learned policy.

    Parameters
    ----------
    policy_ratio : share of the neurons for which one policy is trained, and then used at every amount; None trains one
        for each width, as published
    policy : file with the policy of another preparation, of a model with equal hidden size and neurons; nothing is
        trained
    episodes : how often the policy cuts the whole model in training
    learning_rate : of AdamW, in training the policy
    discount : the reward of block i counts discountⁱ
    round_to : multiple to which the width is rounded; None takes 128 in models at least 1024 wide, 8 in smaller ones;
        1 is the published count

    Raises
    ------
    ChainError
        When a field is out of its range, or both `policy` and `policy_ratio` are given.

    Notes
    -----
    The policy sees the rows of the first matrix of the MLP: gate, or up where there is none. It is paid 1 / KS, with KS
    the Kolmogorov-Smirnov distance between the singular values of the whole matrix and those of the rows that were
    kept. No text is read. What the reward measures is the spectrum of one matrix, not the model's loss, and all rewards
    are positive with no baseline to compare them with: whatever was drawn becomes likelier, all probabilities rise
    towards 1 (on stories260K from 0.61 to 0.95 and more), and the draw becomes a uniform one. There the reward of
    its cuts and their loss differ from those of prunenet-random by less than one seed from another, ours and the
    published code's alike (``benchmarks/results/prunenet_parity.md``): compare with it before paying for a policy.

    From the published code (commit 0b67c44), where it differs from the paper: the reward of a block is discounted by
    its place and later rewards are not added; the loss draws its Gumbel noise anew; gradients are not clipped (the
    code clips after it has cleared them); the policy used is the one saved after the best episode, as its experiments
    do and its released script does from the second run on. Where ours differs from it: float32 where it
    has float16, in which probabilities reach 1 and the logarithm's gradient is not a number; singular values in
    float64; width rounding (it keeps int((1 - r) F)); the two layers without a nonlinearity between them are evaluated
    as one product; the config says the new width, which the code forgets.

    One draw of noise a block serves every width. With one policy for all (`policy_ratio`, `policy`) cuts are therefore
    nested, and one preparation serves all amounts; else it serves those that it was asked for. A finished preparation
    holds its policies as ``policy-WIDTH.safetensors`` or ``policy-shared.safetensors``, for the field `policy`.

    Cost: a policy takes episodes · L eigenproblems of min(K, D)³ and as many steps of AdamW on F D + 2 F numbers; an
    amount takes L eigenproblems for the distance that it reports. Memory: five times the policy and a
    matrix in float64.

    References
    ----------
    [sengupta2025prunenet]_ sections 3.1 to 3.3.
    """

    unit: ClassVar[str] = "neurons"
    family: ClassVar[str] = "width"
    reference: ClassVar[str] = "sengupta2025prunenet"
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    policy_ratio: float | None = None
    policy: str | None = None
    episodes: int = 20
    learning_rate: float = 1e-3
    discount: float = 0.99
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy is not None and self.policy_ratio is not None:
            raise ChainError("prunenet: policy and policy_ratio both say where the policy comes from: leave one out")
        if self.policy_ratio is not None and not 0 < self.policy_ratio < 1:
            raise ChainError(f"prunenet: policy_ratio must be in (0, 1), got {self.policy_ratio}")
        if self.episodes < 1:
            raise ChainError(f"prunenet: episodes must be at least 1, got {self.episodes}")
        if not self.learning_rate > 0:
            raise ChainError(f"prunenet: learning_rate must be positive, such as 0.001, got {self.learning_rate}")
        if not 0 < self.discount <= 1:
            raise ChainError(f"prunenet: discount must be in (0, 1], got {self.discount}")
        check_round_to(self.name(), self.round_to, of="neurons")

    @override
    def reads(self, model: Model, context: Context) -> Mapping[str, str]:
        """The policy's file, where there is one.

        Raises
        ------
        DataError
            When it is missing.
        """
        if self.policy is None:
            return {}
        path = Path(self.policy)
        if not path.is_file():
            raise DataError(f"prunenet found no policy at {path}: name a policy-*.safetensors of a preparation")
        stat = path.stat()
        return {"policy": _sha256(path, stat.st_mtime_ns, stat.st_size)}

    @override
    def whole(self) -> str | None:
        return "trains its policy on a matrix of every block, all of them over and over: take prunenet-random, or ffn"

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_unequal_widths(model)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        width, _ = neuron_width(model, amount, self.round_to)
        return removed_with_neurons(model, width)

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        """Whether a policy is there for the width of every amount; a width that removes nothing needs none."""
        neurons, multiple = prepared.facts["ffn"], prepared.facts["rounding"]
        widths = {cut_width(neurons, amount, multiple) for amount in amounts} - {neurons}
        return prepared.facts["shared"] or widths <= set(prepared.facts["widths"])

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Train the policies that these amounts need and draw the neurons; policies in the folder are kept.

        Raises
        ------
        ChainError
            When `policy_ratio` removes nothing after rounding.
        DataError
            When the file of a policy is missing, or is for a model of another shape.
        """
        neurons = model.shape.ffn
        weights = [neuron_rows(block)[0].detach() for block in model.blocks]
        widths, shared = {neuron_width(model, amount, self.round_to)[0] for amount in amounts} - {neurons}, False
        if self.policy is not None or self.policy_ratio is not None:
            (width,), shared = (widths := {neuron_width(model, self.policy_ratio or 0.0, self.round_to)[0]}), True
            if self.policy_ratio is not None and width == neurons:
                raise ChainError(
                    f"prunenet: policy_ratio {self.policy_ratio} removes none of {neurons} neurons after rounding, so "
                    "that a policy learns nothing: ask for a larger one, or for round_to=1"
                )
        prepared = Prepared.open(context.scratch) or Prepared(context.scratch)
        # Asked for once more with other amounts, the same folder keeps the policies that it has.
        rewards: dict[str, list[float]] = dict(prepared.facts.get("rewards", {}))
        spectra = [singular_values(weight_FD) for weight_FD in weights]
        prepared.put("spectra", {f"block-{index}": spectrum_S for index, spectrum_S in enumerate(spectra)})
        for done, width in enumerate(sorted(widths)):
            key = SHARED if shared else str(width)
            if key in rewards:
                continue
            if self.policy is None:
                policy, rewards[key] = trained(
                    weights,
                    spectra,
                    width,
                    # The width and not the amounts beside it: a policy does not depend on what else was asked for.
                    context.generator(self.name(), "train", width),
                    episodes=self.episodes,
                    learning_rate=self.learning_rate,
                    discount=self.discount,
                    progress=lambda share, done=done: context.progress("policy", (done + share) / len(widths)),
                )
            else:
                self.reads(model, context)  # complains when the file is gone
                policy, rewards[key] = _stored_policy(Path(self.policy), model), []
            orders: dict[str, Tensor] = {}
            for index, weight_FD in enumerate(weights):
                generator = context.generator(self.name(), "draw", index)
                orders[f"block-{index}"] = drawn(log_keep(policy(weight_FD), generator), generator)
            prepared.put(f"policy-{key}", policy.state_dict())
            prepared.put(f"order-{key}", orders)
        _, multiple = neuron_width(model, 0.0, self.round_to)
        return prepared.finish(
            ffn=neurons,
            rounding=multiple,
            shared=shared,
            widths=sorted(int(key) for key in rewards if key != SHARED),
            rewards=rewards,
        )

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        """The model with the policy's neurons; its history says how far the spectra have moved.

        Raises
        ------
        ChainError
            When the preparation has no policy for this amount.
        """
        neurons = model.shape.ffn
        width, multiple = neuron_width(model, amount, self.round_to)
        if width == neurons:
            return model.copy().after(self.done(amount, 0.0, ffn=[neurons, width], rounding=multiple))
        if not self.covers(prepared, [amount]):
            raise ChainError(f"prunenet has no policy for {width} of {neurons} neurons: prepare it for {amount} too")
        orders = prepared.get(f"order-{SHARED if prepared.facts['shared'] else width}")
        spectra = prepared.get("spectra")
        kept: list[Tensor] = []
        distances: list[float] = []
        for index, block in enumerate(model.blocks):
            kept.append(orders[f"block-{index}"][:width])
            cut_S = singular_values(neuron_rows(block)[0][kept[-1].to(model.device)])
            distances.append(ks_distance(spectra[f"block-{index}"].to(model.device), cut_S))
        done = self.done(
            amount,
            1 - width / neurons,
            ffn=[neurons, width],
            rounding=multiple,
            ks_distance=sum(distances) / len(distances),
            reward=sum(map(reward, distances)) / len(distances),
        )
        return keep_neurons(model, kept).after(done)


@lru_cache(maxsize=64)
def _sha256(path: Path, modified_ns: int, size: int) -> str:
    """The hash of a file; taken again when its time or size has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_policy(path: Path, model: Model) -> Policy:
    """A policy from a file, for a model of its shape."""
    shape = model.shape
    policy = Policy(shape.hidden, shape.ffn, torch.Generator())
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"prunenet cannot read the policy {path} ({error}): name a policy-*.safetensors") from error
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise DataError(
            f"prunenet needs a policy for {model.name}, with shapes {expected}, and {path} has {found}: "
            "train one, or take that of a model with equal hidden size and neurons"
        )
    policy.load_state_dict(tensors)
    return policy.to(model.device)
