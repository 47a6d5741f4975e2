"""A name and the one file that defines it.

The file name is the registration: ``compress/methods/slicegpt.py`` defines ``slicegpt`` (``-`` in a name is ``_``
in its file) and its ``__all__`` lists exactly one class. Finding a name imports that file and no other; listing
names imports nothing. Packages of other people join through an entry point.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mariotte.errors import unknown


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
        assert spec is not None, f"there is no package {self.package}"
        assert spec.submodule_search_locations, f"{self.package} is a module, not a package"
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
