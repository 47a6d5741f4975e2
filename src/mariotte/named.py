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
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from mariotte.errors import PluginError, unknown


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
    base : what each of them must be, as ``module:Class``
    """

    kind: str
    package: str
    group: str
    base: str

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
        PluginError
            When another package defines it, and not as it should.
        """
        if points := [point for point in _plugins(self.group) if point.name == name]:
            return self._outside(name, points)
        if name not in self.names():
            raise unknown(self.kind, name, self.names())
        module = importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        (defined,) = module.__all__
        return getattr(module, defined)

    def _outside(self, name: str, points: list[importlib.metadata.EntryPoint]) -> type:
        """The class that another package defines, if it is what the group is for."""
        point = points[0]
        packages = sorted(_package(each) for each in points)
        owners = ["mariotte", *packages] if name in _own(self.package) else packages
        if len(owners) > 1:
            raise PluginError(
                f"a name must be one {self.kind}'s alone, and {name!r} is that of one in "
                f"{' and of one in '.join(owners)}: uninstall {owners[-1]}, or have its author take another name"
            )
        package = owners[0]
        told = f"uninstall {package}, or have its author mend it"
        what = f"the {self.kind} {name!r} of the package {package}"
        try:
            found: Any = point.load()
        except Exception as error:  # whatever its code does when it is run
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise PluginError(f"{what} must be imported from {point.value}, which fails ({said}): {told}") from error
        if not isinstance(found, ModuleType) or point.module.rpartition(".")[2].replace("_", "-") != name:
            raise PluginError(
                f"{what} must be in a module of that name, ending in {name.replace('-', '_')}, and its entry point "
                f"names {point.value}: {told}"
            )
        listed = cast("list[str] | None", getattr(found, "__all__", None))
        if listed is None or len(listed) != 1 or not hasattr(found, listed[0]):
            came = "has none" if listed is None else f"has {list(listed)}"
            raise PluginError(f"{what} needs an __all__ with the name of one class, and {point.value} {came}: {told}")
        kind: Any = getattr(found, listed[0])
        module, _, base = self.base.partition(":")
        if not isinstance(kind, type) or not issubclass(kind, getattr(importlib.import_module(module), base)):
            raise PluginError(f"{what} must be a {base} of {module}, and {point.value} defines {kind!r}: {told}")
        if inspect.isabstract(kind):
            lacking = ", ".join(sorted(cast("frozenset[str]", kind.__abstractmethods__)))
            raise PluginError(f"{what} must define all that a {base} does, and {listed[0]} lacks {lacking}: {told}")
        return kind


def _package(point: importlib.metadata.EntryPoint) -> str:
    """The distribution that declares an entry point, as pip calls it."""
    return point.value if point.dist is None else point.dist.name
