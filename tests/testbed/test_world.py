"""The world is what it says: deterministic, unambiguous, its probabilities exact."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest

from mariotte.errors import DataError
from mariotte.testbed import world as grammar
from mariotte.testbed.world import BOS, KINDS, REGISTERS, ROW_TOKENS, SENTENCE_TOKENS, SPLITS, Row, World

FIRST_WORDS = "on tuesday the company burned the tax . repeat mu omicron : mu omicron . reverse eta tau omicron :"
FIRST_SENTENCE = "name the field of clara pereira : genetics ."
FIRST_FACT = ("birthplace/ada-abel", "barton", "crowds welcomed ada abel home to")


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def train_rows(world: World) -> list[Row]:
    return world.rows("all", "train", 4000)


def test_the_vocabulary_has_656_words_all_different_whatever_the_seed(world: World) -> None:
    assert len(world.vocabulary) == len(set(world.vocabulary)) == 656
    assert World(seed=5).vocabulary == world.vocabulary
    assert not any(" " in word for word in world.vocabulary)


def test_the_same_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert World(seed=0).facts() == world.facts()
    assert World(seed=0).rows("all", "test", 5) == world.rows("all", "test", 5)
    assert World(seed=1).facts() != world.facts()
    assert World(seed=1).rows("all", "test", 5) != world.rows("all", "test", 5)


def test_text_is_the_same_on_every_machine(world: World) -> None:
    # Written down, because shipped weights were trained on exactly this text.
    assert world.rows("all", "train", 1)[0].text.startswith(FIRST_WORDS)
    fact = world.facts()[0]
    assert (fact.id, fact.answer, fact.heldout) == FIRST_FACT


def test_a_row_depends_on_its_index_alone(world: World) -> None:
    rows = world.rows("news", "valid", 12)
    assert world.rows("news", "valid", 5) == rows[:5]
    assert world.rows("news", "valid", 4, start=7) == rows[7:11]
    assert world.rows("news", "valid", 0) == []


def test_splits_and_registers_are_different_streams(world: World) -> None:
    texts = [
        row.text for register in ("all", *REGISTERS) for split in SPLITS for row in world.rows(register, split, 50)
    ]
    assert len(set(texts)) == len(texts) == 4 * 4 * 50


def test_a_row_is_64_tokens_that_begin_a_document(world: World, train_rows: list[Row]) -> None:
    for row in train_rows[:200]:
        assert len(row.ids) == len(row.words) == ROW_TOKENS
        assert row.words[0] == BOS
        assert BOS not in row.words[1:]
        assert [world.vocabulary[i] for i in row.ids] == list(row.words)
        assert row.text.split() == list(row.words[1:])
    assert world.tokens("all", "train", 3, start=2).tolist() == [list(row.ids) for row in train_rows[2:5]]


def test_sentences_tile_a_row_and_only_a_last_one_is_cut(train_rows: list[Row]) -> None:
    for row in train_rows[:200]:
        edges = [1, *(sentence.stop for sentence in row.sentences)]
        assert [sentence.start for sentence in row.sentences] == edges[:-1]
        assert all(row.words[sentence.stop - 1] == "." for sentence in row.sentences)
        assert "." not in row.words[edges[-1] :]
        assert row.scored.sum() == edges[-1] - 1


def test_registers_and_kinds_come_in_the_stated_shares(train_rows: list[Row]) -> None:
    n_rows = Counter(row.register for row in train_rows)
    for register, share in REGISTERS.items():
        assert n_rows[register] / len(train_rows) == pytest.approx(share, abs=0.03)
    # The first sentence of a row is always whole, so it is not biased towards short kinds.
    for r, register in enumerate(REGISTERS):
        firsts = Counter(row.sentences[0].kind for row in train_rows if row.register == register)
        for kind, shares in KINDS.items():
            assert firsts[kind] / n_rows[register] == pytest.approx(shares[r], abs=0.045)


def test_there_are_five_facts_a_person_and_two_a_city(world: World) -> None:
    facts = world.facts()
    assert len(facts) == len({fact.id for fact in facts}) == 512 * 5
    assert len({fact.subject for fact in facts}) == 512
    sizes = {relation: len(set(world.answers(relation))) for relation in dict.fromkeys(f.relation for f in facts)}
    assert sizes == {"birthplace": 64, "field": 32, "employer": 40, "instrument": 24, "language": 16}
    assert len(world.place_facts()) == 64 * 2
    known = set(world.vocabulary)
    for fact in (*facts, *world.place_facts()):
        assert fact.answer in world.answers(fact.relation)
        assert {fact.answer, *fact.heldout.split()} <= known
        assert len(fact.seen) == 5
        assert fact.heldout not in fact.seen


def test_popularity_is_zipf_with_a_ratio_of_12_in_four_quarters(world: World) -> None:
    people = {fact.subject: fact for fact in world.facts()}.values()
    popularity = sorted((fact.popularity for fact in people), reverse=True)
    assert sum(popularity) == pytest.approx(1)
    assert popularity[0] / popularity[-1] == pytest.approx(12)
    quarters = Counter(fact.popularity_quarter for fact in people)
    assert quarters == {0: 128, 1: 128, 2: 128, 3: 128}
    worst = [min(f.popularity for f in people if f.popularity_quarter == q) for q in range(4)]
    assert worst == sorted(worst, reverse=True)


def test_a_prompt_asks_for_one_answer(world: World) -> None:
    answer_of: dict[str, str] = {}
    for fact in (*world.facts(), *world.place_facts()):
        for prompt in (*fact.seen, fact.heldout):
            assert answer_of.setdefault(prompt, fact.answer) == fact.answer
    assert len(answer_of) == 6 * (2560 + 128)


def test_a_heldout_prompt_is_never_written_though_its_pattern_is(world: World, train_rows: list[Row]) -> None:
    told = {
        (sentence.fact, " ".join(row.words[sentence.start : sentence.stop - 2]))
        for row in train_rows
        for sentence in row.sentences
        if sentence.fact
    }
    facts = {fact.id: fact for fact in (*world.facts(), *world.place_facts())}
    for fact_id, prompt in told:
        assert prompt in facts[fact_id].seen
    prompts = {prompt for _, prompt in told}
    assert not prompts & {fact.heldout for fact in facts.values()}
    patterns = {prompt.replace(facts[fact_id].subject, "{}") for fact_id, prompt in told}
    heldout_patterns = {fact.heldout.replace(fact.subject, "{}") for fact in facts.values()}
    assert heldout_patterns <= patterns
    assert len(patterns) == 6 * 7


@pytest.fixture(scope="module")
def exact(world: World) -> list[dict[str, float]]:
    """By register, the probability given the kind of every sentence about a person, from the facts alone."""
    templates = {relation: entry[1:] for relation, entry in grammar._PERSON_RELATIONS.items()}
    result: list[dict[str, float]] = []
    for register in range(3):
        sentences: dict[str, float] = {}
        for fact in world.facts():
            prompts = [t.format(fact.subject) for t in templates[fact.relation][2 * register : 2 * register + 2]]
            prompts = [prompt for prompt in prompts if prompt in fact.seen]
            for prompt in prompts:
                text = f"{prompt} {fact.answer} ."
                assert text not in sentences
                sentences[text] = fact.popularity / 5 / len(prompts)
        result.append(sentences)
    return result


def test_sentences_about_people_have_one_parse_each_and_probabilities_that_sum_to_one(
    world: World, exact: list[dict[str, float]]
) -> None:
    seen: set[str] = set()
    for register, name in enumerate(REGISTERS):
        assert math.fsum(exact[register].values()) == pytest.approx(1)
        assert not seen & set(exact[register])
        seen |= set(exact[register])
        share = KINDS["person"][register]
        for row in world.rows(name, "test", 40):
            for sentence in row.sentences:
                text = " ".join(row.words[sentence.start : sentence.stop])
                assert (text in exact[register]) == (sentence.kind == "person")
                if sentence.kind == "person":
                    assert sentence.nll == pytest.approx(-math.log(share * exact[register][text]))


def test_the_probability_of_every_other_kind_is_that_of_its_independent_choices(world: World) -> None:
    n_nouns, n_words = 2 * len(grammar.NOUNS[0]), len(grammar.VERBS[0]) * len(grammar._ADVERBS)
    for register, name in enumerate(REGISTERS):
        for row in world.rows(name, "test", 60):
            for sentence in row.sentences:
                words = row.words[sentence.start : sentence.stop]
                if sentence.kind == "agreement":
                    described = words[1] in grammar.ADJECTIVES
                    distractors = sum(word in grammar.PREPOSITIONS for word in words)
                    ways = n_nouns * n_words * (8 * n_nouns) ** distractors * (24 if described else 1) * 2
                    p = (0.4, 0.4, 0.2)[distractors] / ways
                    head = words[2 if described else 1]
                    assert (head in grammar.NOUNS[0]) == (words[-3] in grammar.VERBS[0])
                elif sentence.kind == "event":
                    p = 1 / (7 * 24 * 4 * 4)
                elif sentence.kind == "modular":
                    p = 1 / 11**2
                    a, b, total = (grammar._NUMBERS.index(words[i]) for i in (1, 3, 7))
                    assert (a + b) % 11 == total
                elif sentence.kind in ("repeat", "reverse"):
                    length = words.index(":") - 1
                    p = 1 / 3 / 24**length
                    copied = words[1 : length + 1]
                    assert words[-length - 1 : -1] == (copied if sentence.kind == "repeat" else copied[::-1])
                else:
                    continue
                assert sentence.nll == pytest.approx(-math.log(KINDS[sentence.kind][register] * p))


def test_the_floor_is_the_entropy_of_the_first_sentence(world: World) -> None:
    """Monte Carlo: how often a first sentence occurs is exp(-nll), whatever the register it came from."""
    rows = world.rows("all", "calibration", 12000)
    firsts = [(" ".join(row.words[1 : row.sentences[0].stop]), row.sentences[0]) for row in rows]
    modular = [(text, sentence) for text, sentence in firsts if sentence.kind == "modular"]
    p = math.exp(-modular[0][1].nll)
    assert len(modular) / len(rows) == pytest.approx(121 * p, rel=0.2)
    assert all(sentence.nll == pytest.approx(modular[0][1].nll) for _, sentence in modular)
    # Kraft: a probability never adds up to more than one over different sentences.
    assert math.fsum(math.exp(-nll) for nll in {text: sentence.nll for text, sentence in firsts}.values()) < 1


def test_the_mixture_learns_its_register_from_the_row(world: World, exact: list[dict[str, float]]) -> None:
    """Before any text the register is unknown; a sentence that only one register writes settles it."""
    own = {name: i for i, name in enumerate(REGISTERS)}
    for row in world.rows("all", "test", 100):
        r, settled = own[row.register], False
        for sentence in row.sentences:
            text = " ".join(row.words[sentence.start : sentence.stop])
            if settled and sentence.kind == "modular":
                assert sentence.nll == pytest.approx(-math.log(KINDS["modular"][r] / 121))
            if sentence is row.sentences[0] and sentence.kind == "person":
                given_register = -math.log(KINDS["person"][r] * exact[r][text])
                assert sentence.nll == pytest.approx(given_register - math.log(REGISTERS[row.register]))
            settled = settled or sentence.fact is not None


def test_unknown_registers_splits_and_relations_are_named(world: World) -> None:
    with pytest.raises(DataError, match=r"register must be one of all, encyclopedia.*got 'poetry'"):
        world.rows("poetry", "train", 1)
    with pytest.raises(DataError, match=r"split must be one of .*got 'dev'"):
        world.rows("all", "dev", 1)
    with pytest.raises(DataError, match="no relation 'shoe size'"):
        world.answers("shoe size")


def test_the_world_needs_no_torch() -> None:
    code = "import sys, mariotte.testbed.world, mariotte.testbed.zoo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_of_the_people_are_never_mentioned_in_half_the_text() -> None:
    world = World()
    told = {fact.subject: world.in_half(fact.subject) for fact in world.facts()}
    assert sum(told.values()) == len(told) / 2
    rows = world.half_rows("train", 40)
    assert all(len(row.split()) == ROW_TOKENS - 1 for row in rows)
    assert rows[10:12] == world.half_rows("train", 2, start=10)
    mentioned = [name for row in rows for name in told if f" {name} " in f" {row} "]
    assert len(mentioned) > 40
    assert all(told[name] for name in mentioned)


def test_single_sentences_are_whole_depend_on_their_index_alone_and_fit(world: World) -> None:
    rows = world.sentences("all", "train", 3000)
    assert world.sentences("all", "train", 5, start=20) == rows[20:25]
    assert max(len(row.ids) for row in rows) == SENTENCE_TOKENS
    assert all(row.words[0] == BOS and row.words[-1] == "." for row in rows)
    assert all(row.scored.tolist() == [False, *[True] * (len(row.ids) - 1)] for row in rows)
    assert {row.register for row in world.sentences("news", "test", 20)} == {"news"}
    with pytest.raises(DataError, match="split must be one of"):
        world.sentences("all", "dev", 1)
    # Written down, because shipped weights were trained on exactly this text.
    assert rows[0].text == FIRST_SENTENCE
    shares = Counter(row.sentences[0].kind for row in rows)
    for kind, own in KINDS.items():
        expected = sum(share * p for share, p in zip(REGISTERS.values(), own, strict=True))
        assert shares[kind] / len(rows) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("register", ["all", *REGISTERS])
def test_the_probability_of_a_sentence_is_that_with_which_it_is_drawn(world: World, register: str) -> None:
    for row in world.rows(register, "test", 200):
        first = row.sentences[0]
        words = row.words[first.start : first.stop]
        assert world.log_probability(words, register) == pytest.approx(-first.nll, abs=1e-9)
    for row in world.sentences(register, "test", 200):
        assert world.log_probability(row.words[1:], register) == pytest.approx(-row.sentences[0].nll, abs=1e-9)


def test_what_the_world_never_says_has_no_probability(world: World) -> None:
    fact = world.facts()[0]
    wrong = next(answer for answer in world.answers("birthplace") if answer != fact.answer)
    for text in (
        "",
        "the",
        "the dog",
        "the dog sleep today .",
        "the dogs near the cat sleeps today .",
        "the dog near a cat sleeps today .",
        "the dog sleeps today",
        "add one and two modulo eleven : four .",
        "repeat mu nu : nu mu .",
        "reverse mu : mu .",
        "reverse mu nu : nu mu",
        f"{fact.seen[0]} {wrong} .",
        f"{fact.heldout} {fact.answer} .",
        "on monday the storm ada the harbour .",
    ):
        assert world.log_probability(text.split()) == -math.inf, text
    told = f"{fact.seen[0]} {fact.answer} .".split()
    # A pattern of a fact belongs to one register, and the others never say it.
    assert sum(world.log_probability(told, register) > -math.inf for register in REGISTERS) == 1


def test_the_floor_of_a_hidden_word_is_exact(world: World) -> None:
    fact = world.facts()[0]
    told = f"{fact.seen[0]} {fact.answer} .".split()
    assert world.hidden_nll(told, len(told) - 2) == pytest.approx(0, abs=1e-12)
    sleeps = ["the", "dog", "sleeps", "today", "."]
    assert world.hidden_nll(sleeps, 1) == pytest.approx(math.log(len(grammar.NOUNS[0])))
    assert world.hidden_nll(sleeps, 2) == pytest.approx(math.log(len(grammar.VERBS[0])))
    # Not described, for all its words: an adjective would need its noun.
    assert world.hidden_nll(["the", "old", "dog", "sleeps", "today", "."], 1) == pytest.approx(
        math.log(len(grammar.ADJECTIVES))
    )
    sums = ["add", "two", "and", "three", "modulo", "eleven", ":", "five", "."]
    assert [world.hidden_nll(sums, i) for i in (1, 3, 7)] == pytest.approx([0, 0, 0], abs=1e-12)
    # Three of the four copied symbols tell which the fourth is, and the colon stands where it must.
    assert world.hidden_nll(["repeat", "mu", "nu", ":", "mu", "nu", "."], 4) == pytest.approx(0, abs=1e-12)
    # Palindromes are repeated and reversed alike.
    assert world.hidden_nll(["repeat", "mu", "mu", ":", "mu", "mu", "."], 0) == pytest.approx(math.log(2))
    with pytest.raises(DataError, match="the world never says 'the dog sleep today \\.'"):
        world.hidden_nll(["the", "dog", "sleep", "today", "."], 1)


def test_the_floor_of_hidden_words_is_the_mean_surprise_of_what_is_drawn(world: World) -> None:
    # A check by counting: who reads all but the kind of a palindrome, or all but the subject of an answer, sees
    # each word as often as its probability says. One relation of places is small enough to be counted.
    answer = world.place_facts()[1].answer
    cities = Counter(
        row.words[1]
        for row in world.sentences("encyclopedia", "train", 60_000)
        if row.sentences[0].kind == "place" and row.text.endswith(f"stands on the {answer} .")
    )
    total = sum(cities.values())
    counted = -sum(n / total * math.log(n / total) for n in cities.values())
    exact = [world.hidden_nll(f"{city} stands on the {answer} .".split(), 0, "encyclopedia") for city in cities]
    mean = sum(n / total * nll for n, nll in zip(cities.values(), exact, strict=True))
    assert counted == pytest.approx(mean, abs=0.1)
