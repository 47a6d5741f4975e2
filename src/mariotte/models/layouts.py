"""Weights that files hold otherwise than transformers computes with them: under other names, or expert by expert.

transformers says of each family how it renames and joins what it reads, and does the reverse when it saves. Here the
same is done with places in files, so that nothing is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_model_conversion_mapping,  # pyright: ignore[reportUnknownVariableType]
)
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,  # pyright: ignore[reportUnknownVariableType]
    rename_source_key,  # pyright: ignore[reportUnknownVariableType]
)

from mariotte.errors import ModelError
from mariotte.models.paging import Joined, Source, Stored


class Layout:
    """How the files of a model's family name and lay out its weights.

    Parameters
    ----------
    hf : of the family, wherever its parameters are
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        self._family = hf.config.model_type
        found = cast("list[Any]", get_model_conversion_mapping(hf, add_legacy=False))
        stated = [one for one in found if not isinstance(one, PrefixChange)]
        self._renamings = [one for one in stated if isinstance(one, WeightRenaming)]
        self._converters = [one for one in stated if isinstance(one, WeightConverter)]
        # As transformers does when it saves: the last first, each the other way round.
        self._back = cast("list[WeightRenaming]", [one.reverse_transform() for one in reversed(self._renamings)])

    def unknown(self) -> str | None:
        """Why the files cannot be read block by block, in a clause after the model's name; None when they can."""
        for converter in self._converters:
            # Experts one after another along the first dimension, and of each its parts along the second.
            does = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
            if does not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
                return (
                    f"cannot be streamed: files of {self._family} hold {converter.target_patterns[0]} in a layout "
                    "that only transformers' own loading turns into that which it computes with; load it whole"
                )
        return None

    def as_computed(self, sources: Mapping[str, Source], what: str) -> dict[str, Source | Joined]:
        """Where each weight lies that transformers computes with, by its name there.

        Parameters
        ----------
        sources : what files hold, by their names
        what : the model's name for messages

        Raises
        ------
        ModelError
            When some experts lack parts that others have, or parts differ in dtype or shape.
        """
        found: dict[str, Source | Joined] = {}
        parts: dict[str, dict[str, list[Source]]] = {}
        for name in sorted(sources, key=cast(Any, dot_natural_key)):  # experts by their number, as transformers does
            renamed, pattern = rename_source_key(name, self._renamings, self._converters)
            if pattern is None:
                found[renamed] = sources[name]
            else:
                parts.setdefault(renamed, {}).setdefault(pattern, []).append(sources[name])
        for name, by_pattern in parts.items():
            converter = next(one for one in self._converters if set(by_pattern) <= set(one.source_patterns))
            lists = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
            kinds = {(source.dtype, source.shape[1:]) for some in lists for source in some}
            if len({len(some) for some in lists}) != 1 or len(kinds) != 1:
                raise ModelError(
                    f"{what} holds for {name} experts that are not alike: its files are not all of one model"
                )
            found[name] = Joined(tuple(zip(*lists, strict=True)))
        return found

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that transformers computes with, by the names and in the layout of files; nothing is read."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            for stored, part in self._apart(name, tensor).items():
                found[apply_renamings(stored, self._back)] = part
        return found

    def _apart(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        for converter in self._converters:
            before, target, after = name.partition(converter.target_patterns[0])
            if target and isinstance(tensor, Stored):
                count, patterns = tensor.shape[0], converter.source_patterns
                rows = tensor.shape[1] // len(patterns)
                return {
                    f"{before}{pattern.replace('*', str(expert))}{after}": tensor.expert(
                        expert, place * rows, (place + 1) * rows
                    )
                    for place, pattern in enumerate(patterns)
                    for expert in range(count)
                }
        return {name: tensor}
