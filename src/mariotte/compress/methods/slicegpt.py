"""SliceGPT: the stream in front of each norm is turned to its principal directions and cut; shortcuts join the turns.

Shapes: N rows, T tokens of a row, B rows at once, M tokens at once, L layers, D width of the stream, d width kept, O
outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import (
    sdpa_attention_forward,  # pyright: ignore[reportUnknownVariableType]
)
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need
from mariotte.compress.calibration import Means, outer, tokens_for
from mariotte.compress.rotation import principal_directions, random_rotation
from mariotte.compress.scope import oriented
from mariotte.compress.scope import turned as as_held
from mariotte.compress.sequential import Walk
from mariotte.compress.surgery import derive, gathered, parameter_names
from mariotte.cuts.stream import refuse_slicegpt, sliced, sliced_width
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.modeling_mariotte import Sliced
from mariotte.models.paging import Stored, pieces
from mariotte.models.step import Context, Prepared, Step

__all__ = ["SliceGPT"]

ORIENTATIONS = ("pca", "random")

DIRECTIONS = "directions"
"""Key of the principal directions in front of one norm, most energy first."""


def _attention_of_wide_heads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Transformers' own attention, each head filled up with zeros to a multiple of 16 dimensions."""
    settings["scaling"] = settings.get("scaling") or query.shape[-1] ** -0.5
    wide = [functional.pad(x, (0, -x.shape[-1] % 16)) for x in (query, key, value)]
    out, _ = sdpa_attention_forward(module, wide[0], wide[1], wide[2], attention_mask, **settings)
    return out[..., : value.shape[-1]], None


WIDE_HEADS = "mariotte_wide_heads"
AttentionInterface.register(WIDE_HEADS, _attention_of_wide_heads)


@contextlib.contextmanager
def _faster_attention(model: Model) -> Generator[None]:
    """Let heads of 8 dimensions on a processor run as heads of 16, which its kernel does in three quarters of the time.

    The zeros change no score and no sum. Attention is half of what a small model's calibration costs.
    """
    config = cast(Any, model.hf.config)
    before = config._attn_implementation
    shape = model.shape
    widths = {width for layer in range(shape.layers) for width in shape.widths_of(layer)}
    # Falcon's attention knows the kernels that it has by name, and no others.
    known = model.entry.model_type != "falcon"
    if known and before == "sdpa" and model.device.type == "cpu" and any(width % 16 for width in widths):
        config._attn_implementation = WIDE_HEADS
    try:
        yield
    finally:
        config._attn_implementation = before


class HalfWalk(Walk):
    """The stream of the calibration rows, held in front of one norm and moved on by half a block."""

    text_NT: Tensor | None = None
    """True where a token is text; None where all are."""

    @torch.no_grad()
    def directions(self, step: str, model: Model, place: str) -> Tensor:
        """Principal directions of the stream where it is held, (D, D) float64, the strongest first.

        Raises
        ------
        ModelError
            When the stream is not finite.
        """
        gather = Means(outer)
        for rows in self.batches():
            x_MD = self.stream_NTD[rows].to(self._device).flatten(0, 1)
            gather(place, x_MD if self.text_NT is None else x_MD[self.text_NT[rows].flatten().to(x_MD.device)])
        return principal_directions(gather.result(step, model)[place])[0]

    @torch.no_grad()
    def project(self, kept_Dd: Tensor) -> None:
        """Leave of the stream what lies in the kept directions."""
        projector_DD = (kept_Dd @ kept_Dd.T).to(torch.promote_types(self.stream_NTD.dtype, torch.float32))
        for rows in self.batches():
            self.stream_NTD[rows] = self.stream_NTD[rows].to(projector_DD) @ projector_DD

    @torch.no_grad()
    def attend(self, block: Block) -> None:
        """Move on past attention: to the norm of the MLP."""
        attention = cast(Any, block.module.get_submodule(block.entry.output.rpartition(".")[0]))
        beside = self.beside(block.module)
        if isinstance(block.module, Sliced):  # which knows the names of what is handed over without
            places = self._beside[self._place[block.module]].places
            beside = {**dict(zip(block.module.given, places, strict=False)), **beside}
        for rows in self.batches():
            x_BTD = self.stream_NTD[rows].to(self._device)
            out_BTD, *_ = attention(hidden_states=block.attention_norm(x_BTD), **beside)
            self.stream_NTD[rows] = _handed_on(block.attention_shortcut, x_BTD) + _added(block, out_BTD)

    @torch.no_grad()
    def feed_forward(self, block: Block) -> None:
        """Move on past the MLP: to the norm of the next block's attention."""
        mlp = (
            block.module.feed_forward
            if isinstance(block.module, Sliced)
            else block.module.get_submodule(block.entry.down.rpartition(".")[0])
        )
        for rows in self.batches():
            x_BTD = self.stream_NTD[rows].to(self._device)
            self.stream_NTD[rows] = _handed_on(block.mlp_shortcut, x_BTD) + _added(block, mlp(block.mlp_norm(x_BTD)))


def _handed_on(shortcut: nn.Linear | None, x_BTD: Tensor) -> Tensor:
    return x_BTD if shortcut is None else shortcut(x_BTD)


def _added(block: Block, out_BTD: Tensor) -> Tensor:
    """What a sublayer adds to the stream: some families multiply it first."""
    return out_BTD * float(getattr(block.module, "residual_multiplier", 1.0))


def text_mask(tokens_NT: Tensor, pad: int | None) -> Tensor | None:
    """Where rows hold text and not padding at their end, (N, T) bool; None where nothing is padded.

    Padding inside a row, or all of it, is text: the id of padding is often that of the end of a document.
    """
    if pad is None:
        return None
    text_NT = (tokens_NT != pad).flip(1).cumsum(1).flip(1) > 0
    text_NT |= ~text_NT.any(1, keepdim=True)
    return None if bool(text_NT.all()) else text_NT


def _text(model: Model, tokens_NT: Tensor) -> Tensor | None:
    return text_mask(tokens_NT, cast("int | None", model.config.get("pad_token_id")))


@dataclass(frozen=True, kw_only=True)
class SliceGPT(Step):
    """Turn the stream in front of every norm to its principal directions there, and keep the strongest.

    Parameters
    ----------
    sequential : the directions in front of a norm are those of the model as cut so far, as published; false takes
        them all from the uncut model: one pass serves all amounts, and the result is worse
    orientation : pca: the kept dimensions are the principal directions; random: these turned at random among
        themselves, which leaves each logit as it is and spreads the energy, as the published code does by default for
        the sake of later quantization
    round_to : the width kept is rounded down to a multiple of it; 8 as published

    Raises
    ------
    ChainError
        When the orientation is none of these, or `round_to` is not positive.

    Notes
    -----
    With h the stream in front of a norm, Q its principal directions (orthogonal; eigenvectors of the mean of h hᵀ over
    calibration tokens, in float64) and g the norm's weights, RMSNorm(h) = g * h / rms(h) and rms(Qᵀh) = rms(h). Folding
    g and Q into the matrices behind the norm, and Q into those before it, leaves each logit as it is. Since Q is
    another one in front of each norm, the stream is handed on through Qᵀ (this norm's) Q (the next one's): a shortcut
    matrix after attention and one after the MLP in each block. Then d of D dimensions are kept; norms go on dividing by
    the D of the uncut stream, so that what is lost is as if it were zero.

    LayerNorm also subtracts the mean of h, and adds biases. With M = 1 - 11ᵀ / D it is RMSNorm of M h: M goes into
    whatever writes to the stream, the biases into the matrices that read it, which then need some, and the result has
    RMSNorms. Where attention and MLP stand side by side (phi, gpt_neox, falcon) both read one rotation, and a block has
    one shortcut.

    The shortcuts are parameters and are counted: d² a norm, so that a small cut makes the model larger (below an eighth
    of the width for the shape of Llama-2-7B), and a tied head is untied, as the final norm's weights cannot be folded
    into both ends. The head, and what the last block writes, keep the full width, as published. A cut of nothing
    returns the model as it is. The result is irregular: transformers reads its checkpoint with
    ``trust_remote_code=True``.

    `slice` does without shortcuts and keeps an ordinary architecture; `slicegpt` adapts to each norm and pays for it.

    Departures from the published code: embeddings keep their mean, which it subtracts also where norms are RMSNorms and
    the model is another one without it (loss 1.77 to 1.81 on stories260K before any cut, see
    ``benchmarks/results/slicegpt_parity.md``); eps is the model's own and not always 1e-5; the rotation behind the last
    block, after which nothing is cut, is left out; the damping of the moments, which moves no eigenvector, too.

    Cost, for N T = M tokens: one pass over the calibration text (for every amount when sequential, otherwise for all),
    D² more multiplications a token and norm for the moment and as many for the projection, 2 L eigenproblems of D³, and
    two products a weight. Memory: the stream of all calibration tokens, M D. Stored: D² numbers, for each norm when not
    sequential.

    References
    ----------
    [ashkboos2024slicegpt]_ sections 3.1 to 3.4; the published code is microsoft/TransformerCompression.
    """

    unit: ClassVar[str] = "hidden"
    family: ClassVar[str] = "slice"
    reference: ClassVar[str] = "ashkboos2024slicegpt"
    streams: ClassVar[bool] = True
    plain: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    sequential: bool = True
    orientation: str = "pca"
    round_to: int = 8

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orientation not in ORIENTATIONS:
            raise ChainError(f"slicegpt: orientation must be {' or '.join(ORIENTATIONS)}, got {self.orientation!r}")
        accounting.check_round_to(self.name(), self.round_to, of="dimensions")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_slicegpt(model)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        after = sliced(model.shape, sliced_width(model.shape, amount, self.round_to))
        return model.counts.n_params - accounting.count_shape(after).n_params

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Find the directions that no amount changes: all of them, or when sequential those of the embeddings.

        Raises
        ------
        DataError
            When there are fewer than two calibration tokens.
        ModelError
            When activations are not finite.
        """
        model = centred(model)
        prepared = Prepared(context.scratch)
        if self.sequential:
            prepared.put("stream-0", {DIRECTIONS: self._embedded(model, context)})
        else:
            for key, directions_DD in self._walk(model, context, None, self._embedded(model, context)):
                prepared.put(key, {DIRECTIONS: directions_DD})
        return prepared.finish(hidden=model.shape.hidden)

    def _embedded(self, model: Model, context: Context) -> Tensor:
        """The principal directions of the embeddings of the calibration tokens, which no amount changes."""
        tokens_NT = tokens_for(context, self.name())
        text_NT = _text(model, tokens_NT)
        if model.entry.positions:
            walk = HalfWalk(model, context, self.name())
            walk.text_NT = text_NT
            return walk.directions(self.name(), model, "the embeddings")
        ids_M = (tokens_NT if text_NT is None else tokens_NT[text_NT]).flatten()
        # Each embedding that occurs once, as often as its token does: the same moment without the others.
        ids_U, count_U = cast("tuple[Tensor, Tensor]", ids_M.to(model.device).unique(return_counts=True))
        embedded_UD = functional.embedding(ids_U, model.embeddings.weight).double()
        return principal_directions(embedded_UD.T @ (embedded_UD * count_U[:, None]) / len(ids_M))[0]

    def _walk(
        self, model: Model, context: Context, width: int | None, first_DD: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """The principal directions in front of every norm but the last, by key.

        Parameters
        ----------
        width : dimensions kept in front of every norm, which all later directions depend on; None keeps all
        first_DD : those in front of the first, which are the same whatever is cut
        """
        walk = HalfWalk(model, context, self.name())
        walk.text_NT = _text(model, tokens_for(context, self.name()))
        parts = ("block",) if model.entry.parallel else ("attention", "mlp")
        halves = [(block, half) for block in model.blocks for half in parts]
        for place, (block, half) in enumerate(halves):
            where = f"the stream before {half} of block {place // len(parts)}"
            directions_DD = first_DD if place == 0 else walk.directions(self.name(), model, where)
            yield f"stream-{place}", directions_DD
            context.progress("rotation", (place + 1) / len(halves))
            if place + 1 == len(halves):
                break
            if width is not None:
                walk.project(directions_DD[:, :width])
            if half == "block":
                walk.advance(block.module)
            elif half == "attention":
                with _faster_attention(model):
                    walk.attend(block)
            else:
                walk.feed_forward(block)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        """See `Step.apply`.

        Raises
        ------
        DataError
            When sequential and there is no calibration text.
        """
        shape = model.shape
        width = sliced_width(shape, amount, self.round_to)
        done = self.done(
            amount,
            1 - width / shape.hidden,
            hidden=[shape.hidden, width],
            rounding=self.round_to,
            untied=shape.tied and width < shape.hidden,
        )
        if width == shape.hidden:
            return model.copy().after(done)
        return self._cut(model, prepared, width, context).after(done)

    def _cut(self, model: Model, prepared: Prepared, width: int, context: Context) -> Model:
        """The turned model, cut to its first `width` dimensions; of full width, its logits are the model's own."""
        model = centred(model)
        places = model.shape.layers * (1 if model.entry.parallel else 2)
        if self.sequential:
            first_DD = prepared.get("stream-0")[DIRECTIONS].to(model.device)
            found = (directions_DD for _, directions_DD in self._walk(model, context, width, first_DD))
        else:
            found = (prepared.get(f"stream-{place}")[DIRECTIONS].to(model.device) for place in range(places))
        kept = gathered(model)
        for place, directions_DD in enumerate(found):
            kept_Dd = directions_DD[:, :width]
            if self.orientation == "random":
                generator = context.generator("slicegpt", "orientation", place, width)
                kept_Dd = kept_Dd @ random_rotation(width, generator).to(model.device)
            kept[str(place)] = kept_Dd
        shape = sliced(model.shape, width, always=True)
        sizes = {
            **{key: width for key in (model.entry.hidden, model.entry.embedding) if key},
            model.entry.head_dim: shape.head_dim,
            "shortcuts": True,
            "norm_size": model.config.get("norm_size") or model.shape.hidden,
            "final_size": shape.final_size,
        }
        return derive(model, turned(model, kept), sizes, untie=model.shape.tied, irregular=True)


def centred(model: Model) -> Model:
    """A model whose norms are RMSNorms, and whose logits are those of the one given; that one, if it is such a model.

    Notes
    -----
    LayerNorm(h) = g * Mh / rms(Mh) + b with M = 1 - 11ᵀ / D, which subtracts the mean; also of a stream that has no
    mean. So M goes into whatever writes to the stream, and g and b into the matrices that read it, which then need
    biases, and so does the head. Its blocks have shortcuts that hand on all of the stream.
    """
    if model.entry.rms_norm:
        return model
    names, entry, shape = parameter_names(model), model.entry, model.shape
    weights = gathered(model)
    for table in (entry.embeddings, entry.positions):
        if table:
            table_VD = cast(Tensor, model.hf.get_submodule(table).weight)
            weights[f"{table}.weight"] = _by_rows(table_VD, lambda rows_VD: rows_VD - rows_VD.mean(1, keepdim=True))
    for block in model.blocks:
        for norm, matrices in ((block.attention_norm, block.attention[:-1]), (block.mlp_norm, block.ffn[:-1])):
            for matrix in matrices:
                weights |= _taking_over(names[matrix.weight], matrix, norm)
        for matrix in (block.output, block.down):
            weight_DI = oriented(matrix).double()
            weights[names[matrix.weight]] = as_held(matrix, weight_DI - weight_DI.mean(0))
            if matrix.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] some families have none
                weights[names[matrix.bias]] = matrix.bias.double() - matrix.bias.double().mean()
        for path in (entry.attention_shortcut, *(() if entry.parallel else (entry.mlp_shortcut,))):
            weights[f"{block.path}.{path}.weight"] = torch.eye(shape.hidden, device=model.device)
    weights |= _taking_over(f"{entry.head}.weight", model.head, model.final_norm)
    sizes = {"shortcuts": True, "norm_size": shape.hidden, "input_biases": True}
    return derive(model, weights, sizes, untie=shape.tied, irregular=True)


def _taking_over(name: str, matrix: nn.Linear, norm: nn.Module) -> dict[str, Tensor]:
    """A matrix and its biases with the weights and biases of the norm in front of it, by name."""
    shift_O = torch.cat([rows_OD.double() @ cast(Tensor, norm.bias).double() for rows_OD in pieces(oriented(matrix))])
    bias_O = cast("Tensor | None", matrix.bias)
    return {
        name: as_held(matrix, _folded(matrix, norm)),
        f"{name.removesuffix('.weight')}.bias": shift_O if bias_O is None else bias_O.double() + shift_O,
    }


def turned(model: Model, kept: Mapping[str, Tensor]) -> MutableMapping[str, Tensor]:
    """The parameters of the model with its stream turned, and cut, in front of every norm but the last.

    Parameters
    ----------
    kept : (D, d) float64, orthonormal columns, by the number of each of 2 L norms, or of L blocks whose parts stand
        side by side

    Returns
    -------
    Every parameter that changes, by the name it has in the irregular model; biases behind norms stay
    """
    names = parameter_names(model)
    entry = model.entry
    weights = gathered(model)
    first_Dd = kept["0"]
    for table in (entry.embeddings, entry.positions):
        if table:
            table_VD = cast(Tensor, model.hf.get_submodule(table).weight)
            weights[f"{table}.weight"] = _by_rows(table_VD, lambda rows_VD: rows_VD @ first_Dd)
    parts = 1 if entry.parallel else 2
    for index, block in enumerate(model.blocks):
        before_Dd, between_Dd = kept[str(parts * index)], kept[str(parts * (index + 1) - 1)]
        after = kept[str(parts * (index + 1))] if parts * (index + 1) < len(kept) else None  # the head's basis stays
        beside_Dd = after if entry.parallel else between_Dd
        for norm, matrices, read_Dd in (
            (block.attention_norm, block.attention[:-1], before_Dd),
            (block.mlp_norm, block.ffn[:-1], between_Dd),
        ):
            for matrix in matrices:
                weights[names[matrix.weight]] = as_held(matrix, _folded(matrix, norm, read_Dd))
        for matrix, written_Dd in ((block.output, beside_Dd), (block.down, after)):
            for parameter in matrix.parameters():
                new = (oriented(matrix) if parameter is matrix.weight else parameter).double()
                new = new if written_Dd is None else written_Dd.T @ new
                weights[names[parameter]] = as_held(matrix, new) if parameter is matrix.weight else new
        for path, shortcut, read_Dd, written_Dd in (
            (entry.attention_shortcut, block.attention_shortcut, before_Dd, beside_Dd),
            (entry.mlp_shortcut, block.mlp_shortcut, between_Dd, after),
        )[:parts]:
            through_Dd = read_Dd if shortcut is None else shortcut.weight.double() @ read_Dd
            through_Dd = through_Dd if written_Dd is None else written_Dd.T @ through_Dd
            weights[f"{entry.blocks}.{index}.{path}.weight"] = through_Dd
    # By its own name: a tied head shares the embeddings' parameter now, and will not after a cut.
    weights[f"{entry.head}.weight"] = _folded(model.head, model.final_norm)
    return weights


def _folded(linear: nn.Linear, norm: nn.Module, read_Dd: Tensor | None = None) -> Tensor:
    """A matrix that takes over the weights of the norm before it, (O, D), or (O, d) of a stream that is turned.

    Norms of sliced models have no weights.
    """
    scale_D = cast("Tensor | None", getattr(norm, "weight", None))

    def folded(rows_OD: Tensor) -> Tensor:
        rows_OD = rows_OD if scale_D is None else rows_OD * scale_D.double()
        return rows_OD if read_Dd is None else rows_OD @ read_Dd

    return _by_rows(oriented(linear), folded)


def _by_rows(weight_OD: Tensor, does: Callable[[Tensor], Tensor]) -> Tensor:
    """What becomes of the rows of a matrix, given in float64 and left so.

    Of one on disk some rows at a time, left in its own dtype: the tables of a vocabulary are larger than any block, and
    in float64 twice or four times as large again.
    """
    if not isinstance(weight_OD, Stored):
        return does(weight_OD.double())
    return torch.cat([does(piece_RD.double()).to(weight_OD.dtype) for piece_RD in pieces(weight_OD)])
