"""A name and the one file that defines it.

The file name is the registration: ``compress/methods/slicegpt.py`` defines ``slicegpt`` (``-`` in a name is ``_``
in its file) and its ``__all__`` lists exactly one class. Finding a name imports that file and no other; listing
names imports nothing. Packages of other people join through an entry point.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mariotte.errors import UnknownNameError


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """The error for a name that nothing defines: the nearest names, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"no {kind} named {name!r}{suggestion} (known: {', '.join(known)}){hint}")


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
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations, f"{self.package} is not a package"
        files = (file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.py"))
        own = {file.stem.replace("_", "-") for file in files if not file.stem.startswith("_")}
        return sorted(own | {point.name for point in importlib.metadata.entry_points(group=self.group)})

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def find(self, name: str) -> type:
        """The class called `name`.

        Raises
        ------
        UnknownNameError
            When nothing defines it; the message lists its neighbours and all that exist.
        """
        for point in importlib.metadata.entry_points(group=self.group):
            if point.name == name:
                return point.load()
        if name not in self.names():
            raise unknown(self.kind, name, self.names())
        module = importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        (defined,) = module.__all__
        return getattr(module, defined)
