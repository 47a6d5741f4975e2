"""A name and the one file that defines it.

The file name is the registration: ``compress/methods/slicegpt.py`` defines ``slicegpt`` (``-`` in a name is ``_``
in its file) and its ``__all__`` lists exactly one class. Finding a name imports that file and no other; listing
names imports nothing. Packages of other people join through an entry point.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mariotte.errors import unknown


@functools.lru_cache(maxsize=64)
def _plugins(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """What other packages add: looked for once, as it reads a file of every installed package."""
    return tuple(importlib.metadata.entry_points(group=group))


@functools.lru_cache(maxsize=64)
def _own(package: str) -> frozenset[str]:
    """Names of the files of a package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"there is no package {package}"
    assert spec.submodule_search_locations, f"{package} is a module, not a package"
    files = (file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.py"))
    return frozenset(file.stem.replace("_", "-") for file in files if not file.stem.startswith("_"))


@dataclass(frozen=True)
class Catalogue:
    """The things of one kind that can be named from outside: chains, studies, the command line, stored records.

    Parameters
    ----------
    kind : what an error calls one of them, such as "method"
    package : the package whose modules define them
    group : entry-point group through which other packages add theirs
    """

    kind: str
    package: str
    group: str

    def names(self) -> list[str]:
        """Every name, sorted; imports none of the files behind them."""
        return sorted(_own(self.package) | {point.name for point in _plugins(self.group)})

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def find(self, name: str) -> type:
        """The class called `name`.

        Raises
        ------
        UnknownNameError
            When nothing defines it; the message lists its neighbours and all that exist.
        """
        for point in _plugins(self.group):
            if point.name == name:
                return point.load()
        if name not in self.names():
            raise unknown(self.kind, name, self.names())
        module = importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        (defined,) = module.__all__
        return getattr(module, defined)
