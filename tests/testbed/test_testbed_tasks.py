from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from mariotte.errors import UnknownNameError
from mariotte.testbed.tasks import N_ITEMS, TASKS, Item, task
from mariotte.testbed.world import NOUNS, VERBS, World

SHA256 = {
    "agreement": "0692a6a9b8dd2d87",
    "events": "c01c4cd85338beab",
    "facts": "6d36fc82ef0bb658",
    "paraphrase": "f51a80bf7419403e",
    "places": "7f845a0399f75643",
    "reverse": "d44f98c2958b8ad1",
}
"""The first digits of the items' hash: they are part of the protocol of every number measured on them."""


def groups(name: str) -> list[list[Item]]:
    """Items that share their choices, as they were made: neighbours."""
    size = round(1 / TASKS[name])
    items = task(name).items
    return [[*items[i : i + size]] for i in range(0, len(items), size)]


@pytest.mark.parametrize("name", TASKS)
def test_the_items_never_change(name: str) -> None:
    found = hashlib.sha256(repr(task(name).items).encode()).hexdigest()
    assert found.startswith(SHA256[name])


@pytest.mark.parametrize("name", TASKS)
def test_there_are_enough_items_and_no_question_twice(name: str) -> None:
    items = task(name).items
    assert len(items) == N_ITEMS >= 500
    assert len({(item.context, item.choices[item.gold]) for item in items}) == N_ITEMS
    assert all(len(item.choices) == round(1 / task(name).chance) == len({*item.choices}) for item in items)


@pytest.mark.parametrize("name", TASKS)
def test_whoever_ignores_the_context_scores_exactly_chance(name: str) -> None:
    for group in groups(name):
        assert len({item.choices for item in group}) == 1
        assert sorted(item.gold for item in group) == [*range(len(group))]
        assert len({item.context for item in group}) == len(group)


@pytest.mark.parametrize("name", TASKS)
def test_choices_are_equally_long_and_of_the_world(name: str) -> None:
    known = {*World().vocabulary}
    for item in task(name).items:
        assert {*item.context.split(), *" ".join(item.choices).split()} <= known
        assert len({len(choice.split()) for choice in item.choices}) == 1


def test_agreement_is_with_the_first_noun_and_all_else_is_equal() -> None:
    nouns, verbs = ([{word: i for i, word in enumerate(words)} for words in pair] for pair in (NOUNS, VERBS))
    nearest = 0
    for group in groups("agreement"):
        for number, item in enumerate(group):
            found = [0 if word in nouns[0] else 1 for word in item.context.split() if word in (nouns[0] | nouns[1])]
            assert found[0] == number
            assert len(found) >= 2
            assert item.choices[item.gold] in verbs[number]
            nearest += found[-1] == number
        heads = [[w for w in item.context.split() if w not in (nouns[0] | nouns[1])] for item in group]
        assert heads[0] == heads[1]
    assert nearest == N_ITEMS / 2  # whoever listens to the last noun scores exactly chance too


def test_facts_are_true_and_their_patterns_seen_or_held_out() -> None:
    world = World()
    seen = {prompt: fact for fact in world.facts() for prompt in fact.seen}
    heldout = {fact.heldout: fact for fact in world.facts()}
    for name, known in (("facts", seen), ("paraphrase", heldout)):
        for item in task(name).items:
            assert known[item.context].answer == item.choices[item.gold]
            assert {*item.choices} <= {*world.answers(known[item.context].relation)}
    for group in groups("facts"):
        assert len({seen[item.context].subject.split()[0] for item in group}) == 1
    assert len({heldout[item.context].subject for item in task("paraphrase").items}) > 250


def test_places_are_true() -> None:
    seen = {prompt: fact.answer for fact in World().place_facts() for prompt in fact.seen}
    assert all(seen[item.context] == item.choices[item.gold] for item in task("places").items)


def test_one_choice_alone_is_what_the_agent_does() -> None:
    habits = World().habits()
    for item in task("events").items:
        deeds, objects = habits[item.context.split()[-1]]
        own = [choice.split()[0] in deeds and choice.split()[-1] in objects for choice in item.choices]
        assert [*map(bool, own)].index(True) == item.gold
        assert sum(own) == 1
        # Two of the others are right by half: the deed alone, or the object alone.
        half = [(choice.split()[0] in deeds) != (choice.split()[-1] in objects) for choice in item.choices]
        assert sum(half) == 2


def test_reversed_symbols() -> None:
    for item in task("reverse").items:
        symbols = item.context.split()[1:-1]
        assert item.choices[item.gold].split() == symbols[::-1]
        assert all(sorted(choice.split()) == sorted(symbols) for choice in item.choices)


@pytest.mark.parametrize("name", TASKS)
def test_right_choices_stand_everywhere(name: str) -> None:
    counts = Counter(item.gold for item in task(name).items)
    assert {*counts.values()} == {N_ITEMS * TASKS[name]}


def test_another_seed_is_another_world() -> None:
    assert task("facts", seed=1).items != task("facts").items


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="no testbed task named 'agrement'; did you mean 'agreement'"):
        task("agrement")
