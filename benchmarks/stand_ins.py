"""Stand-ins for modules that published code imports, and that a comparison with it does not use."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Generator, Iterable, Mapping


@contextlib.contextmanager
def stand_ins(modules: Mapping[str, Iterable[str]]) -> Generator[None]:
    """While it lasts, these modules can be imported: empty ones, in which these names are None.

    Nothing that is measured can come from one. A stand-in has no code, to call None is an error, and a name that it
    lacks cannot be found: whatever the published code does with one stops the comparison and does not change it.
    Afterwards the modules are what they were, so that what is imported later gets none.
    """
    before = {name: sys.modules.get(name) for name in modules}
    for name, names in modules.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
