"""Six multiple-choice tasks in the world's language, made from its own grammar and facts.

Items come in groups that share their choices: in a group of four every choice is right once. So a model that ignores
what tells the items of a group apart (the subject, the agent, the number of the first noun, the order of the symbols)
scores exactly chance, whichever words it prefers, and what a task measures is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from random import Random
from types import MappingProxyType
from typing import Final

from mariotte.errors import DataError, unknown
from mariotte.testbed.world import (
    ADJECTIVES,
    DAYS,
    DESCRIBED,
    NOUNS,
    PREPOSITIONS,
    SYMBOLS,
    VERBS,
    Fact,
    World,
    pick,
    sample,
)

N_ITEMS: Final = 512
"""Items of each task; whole groups, and enough that a standard error is at most 2.2 points."""

ATTEMPTS: Final = 200_000
"""Groups drawn until there are enough with new questions; places come nearest to it, with a few thousand."""

TASKS: Final[Mapping[str, float]] = MappingProxyType(
    {"agreement": 1 / 2, "events": 1 / 4, "facts": 1 / 4, "paraphrase": 1 / 4, "places": 1 / 4, "reverse": 1 / 4}
)
"""Every task, and the accuracy of a model that knows nothing of it."""


@dataclass(frozen=True)
class Item:
    """A question with its choices; a model answers with the choice that it finds likeliest after the context.

    Parameters
    ----------
    context : words to the left
    choices : what may follow, after a space
    gold : index of the right choice
    """

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items of one kind.

    Parameters
    ----------
    name : such as ``agreement``
    chance : accuracy of a model that knows nothing of it
    items : in an order in which the first ones are a fair sample of all
    """

    name: str
    chance: float
    items: tuple[Item, ...]


def task(name: str, seed: int = 0) -> Task:
    """One of the six tasks, of the world of a seed: equal seeds, equal items on every machine.

    Raises
    ------
    UnknownNameError
        When the testbed has no such task.

    Examples
    --------
    >>> task("places").items[0]
    Item(context='where ...', choices=('...', '...', '...', '...'), gold=...)
    """
    if name not in TASKS:
        raise unknown("testbed task", name, TASKS)
    return _task(name, seed)


@functools.lru_cache(maxsize=32)
def _task(name: str, seed: int) -> Task:
    # Each task has its own stream, far from those of the world's rows, so that no change of one moves another.
    random = Random((1 << 100) + (seed << 10) + [*TASKS].index(name))
    world = World(seed)
    groups = _MAKERS[name](world, random)
    items: list[Item] = []
    asked: set[tuple[str, str]] = set()
    for _ in range(ATTEMPTS):
        group = next(groups)
        questions = {(item.context, item.choices[item.gold]) for item in group}
        if len({context for context, _ in questions}) == len(group) and asked.isdisjoint(questions):
            asked |= questions
            items += group
        if len(items) == N_ITEMS:
            return Task(name=name, chance=TASKS[name], items=tuple(items))
    raise DataError(f"the world of seed {seed} has no {N_ITEMS} different items for {name!r}: choose another seed")


def _shuffled(random: Random, contexts: Sequence[str], answers: Sequence[str]) -> list[Item]:
    """A group: each context with the answers of all, its own being right, in one random order for the whole group."""
    choices = tuple(sample(random, answers, len(answers)))
    return [Item(context, choices, choices.index(answer)) for context, answer in zip(contexts, answers, strict=True)]


def _agreement(world: World, random: Random) -> Iterator[list[Item]]:
    """The verb agrees with the first noun, whatever the number of the one or two nouns between."""
    del world  # the grammar is the same in every world
    while True:
        adjective = f"{ADJECTIVES[pick(random, len(ADJECTIVES))]} " if random.random() < DESCRIBED else ""
        noun, verb = pick(random, len(NOUNS[0])), pick(random, len(VERBS[0]))
        between = ""
        for _ in range(1 + pick(random, 2)):
            preposition = PREPOSITIONS[pick(random, len(PREPOSITIONS))]
            between += f" {preposition} the {NOUNS[pick(random, 2)][pick(random, len(NOUNS[0]))]}"
        contexts = [f"the {adjective}{nouns[noun]}{between}" for nouns in NOUNS]
        yield _shuffled(random, contexts, [verbs[verb] for verbs in VERBS])


def _events(world: World, random: Random) -> Iterator[list[Item]]:
    """What an agent does, and to what: of two deeds and two objects, each with each, one pair is its own."""
    habits = {agent: (set(deeds), set(objects)) for agent, (deeds, objects) in world.habits().items()}
    doers: dict[tuple[str, str], list[str]] = {}
    for agent, (deeds, objects) in habits.items():
        for pair in product(sorted(deeds), sorted(objects)):
            doers.setdefault(pair, []).append(agent)
    crossed: list[list[tuple[tuple[str, str], list[str]]]] = []
    for first, second in combinations(doers, 2):
        pairs = [(deed, thing) for deed in (first[0], second[0]) for thing in (first[1], second[1])]
        if len({*pairs}) < len(pairs) or not all(pair in doers for pair in pairs):
            continue
        # For each pair the agents that do this deed to this object, and have nothing to do with the other two words.
        words = {*first, *second}
        able = [(pair, [a for a in doers[pair] if words & set().union(*habits[a]) == {*pair}]) for pair in pairs]
        if all(agents for _, agents in able):
            crossed.append(able)
    while True:
        able = crossed[pick(random, len(crossed))]
        agents = [agents[pick(random, len(agents))] for _, agents in able]
        contexts = [f"on {DAYS[pick(random, len(DAYS))]} the {agent}" for agent in agents]
        yield _shuffled(random, contexts, [" the ".join(pair) for pair, _ in able])


def _about(
    facts: Sequence[Fact], alike: Callable[[Fact], str], prompts: Callable[[Fact], Sequence[str]], random: Random
) -> Iterator[list[Item]]:
    """Four facts of one relation about subjects that are alike, with four different answers."""
    kinds: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        kinds.setdefault((fact.relation, alike(fact)), []).append(fact)
    names = list(kinds)
    while True:
        same = kinds[names[pick(random, len(names))]]
        group = [same[pick(random, len(same))] for _ in range(4)]
        if len({fact.answer for fact in group}) < len(group):
            continue
        contexts = [(asked := prompts(fact))[pick(random, len(asked))] for fact in group]
        yield _shuffled(random, contexts, [fact.answer for fact in group])


def _facts(world: World, random: Random) -> Iterator[list[Item]]:
    """A person's fact, in a pattern in which it was told, among those of three others with the same first name.

    Namesakes are what a damaged model takes for one another: the hardest choices that the facts offer.
    """
    return _about(world.facts(), lambda fact: fact.subject.split()[0], lambda fact: fact.seen, random)


def _paraphrase(world: World, random: Random) -> Iterator[list[Item]]:
    """A person's fact, in the pattern in which it never was told, among those of any three others."""
    return _about(world.facts(), lambda fact: "", lambda fact: (fact.heldout,), random)


def _places(world: World, random: Random) -> Iterator[list[Item]]:
    """A city's country or river, in a pattern in which it was told."""
    return _about(world.place_facts(), lambda fact: "", lambda fact: fact.seen, random)


def _reverse(world: World, random: Random) -> Iterator[list[Item]]:
    """Three different symbols backwards; the choices are orders of the same three."""
    del world  # as in `_agreement`
    while True:
        orders = sample(random, [*map(" ".join, permutations(sample(random, SYMBOLS, 3)))], 4)
        yield _shuffled(random, [f"reverse {order} :" for order in orders], [" ".join(o.split()[::-1]) for o in orders])


_MAKERS: Final[Mapping[str, Callable[[World, Random], Iterator[list[Item]]]]] = MappingProxyType(
    {
        "agreement": _agreement,
        "events": _events,
        "facts": _facts,
        "paraphrase": _paraphrase,
        "places": _places,
        "reverse": _reverse,
    }
)
