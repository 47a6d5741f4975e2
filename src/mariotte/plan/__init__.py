"""Plans: which chain meets a budget, from shapes, laws and a store alone, and which experiments would tell more."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mariotte.lazy import lazy

if TYPE_CHECKING:
    from mariotte.plan.answer import Option as Option
    from mariotte.plan.answer import Plan as Plan
    from mariotte.plan.budget import Budget as Budget
    from mariotte.plan.budget import Floor as Floor
    from mariotte.plan.budget import read_budget as read_budget
    from mariotte.plan.probes import probe as probe
    from mariotte.plan.ranking import Planner as Planner
    from mariotte.plan.search import plan as plan
    from mariotte.plan.search import planner as planner
    from mariotte.plan.verify import execute as execute

_HOME = {
    "Budget": "mariotte.plan.budget",
    "Floor": "mariotte.plan.budget",
    "Option": "mariotte.plan.answer",
    "Plan": "mariotte.plan.answer",
    "Planner": "mariotte.plan.ranking",
    "plan": "mariotte.plan.search",
    "planner": "mariotte.plan.search",
    "probe": "mariotte.plan.probes",
    "read_budget": "mariotte.plan.budget",
    "execute": "mariotte.plan.verify",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__


class _Called(ModuleType):
    """The package, which can be called: ``mariotte.plan(...)`` is the function, whether or not this was imported."""

    def __call__(self, *given: Any, **named: Any) -> Plan:
        from mariotte.plan.search import plan

        return plan(*given, **named)


sys.modules[__name__].__class__ = _Called
