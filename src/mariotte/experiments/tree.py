"""Chains as a tree: those that begin alike share the beginning, and amounts of one step share its preparation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mariotte.chain import Chain
from mariotte.experiments.identity import Part
from mariotte.models.step import Step


@dataclass
class Group:
    """One step on one state of the model, at several amounts: prepared once, applied at each."""

    step: Step
    children: dict[int | float, Node] = field(default_factory=lambda: dict[int | float, "Node"]())


@dataclass
class Node:
    """A state of the model: what a beginning of some chains leads to.

    Parameters
    ----------
    parts : the steps that lead here
    wanted : whether a chain ends here, so that this state is measured
    groups : the steps that go on from here
    """

    parts: tuple[Part, ...] = ()
    wanted: bool = False
    groups: list[Group] = field(default_factory=lambda: list[Group]())

    @property
    def chain(self) -> Chain:
        """The canonical chain that leads here."""
        return Chain(tuple(part.link for part in self.parts))

    def walk(self) -> Iterator[Node]:
        """The node and all below it, in the order in which they are built."""
        yield self
        for group in self.groups:
            for child in group.children.values():
                yield from child.walk()


def grow(chains: Iterable[tuple[Part, ...]]) -> Node:
    """The tree of some chains; its root is the dense model, always wanted: it is what everything is compared with."""
    root = Node(wanted=True)
    for parts in chains:
        node = root
        for depth, part in enumerate(parts, 1):
            group = next((g for g in node.groups if g.step == part.step), None)
            if group is None:
                group = Group(part.step)
                node.groups.append(group)
            node = group.children.setdefault(part.amount, Node(parts[:depth]))
        node.wanted = True
    return root
