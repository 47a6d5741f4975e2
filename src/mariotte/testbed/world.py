"""A seeded synthetic world, exactly known: people and places with facts, and text about them.

Text comes in rows (documents) of 64 tokens in one of three registers. Every word is one token, every sentence has
exactly one parse, and the probability of every sentence is known, so the floor that no model can beat is measured on
the very rows on which a model's loss is measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from random import Random
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mariotte.errors import DataError

BOS, UNKNOWN, PADDING = "<bos>", "<unk>", "<pad>"
ROW_TOKENS: Final = 64
SENTENCE_TOKENS: Final = 13  # of the longest sentence, <bos> among them
REGISTERS: Final = MappingProxyType({"encyclopedia": 0.40, "news": 0.35, "instructions": 0.25})
SPLITS: Final = ("train", "calibration", "valid", "test")
# Share of each kind of sentence, by register. Text about people dominates: each of the 2560 facts must be met some
# forty times in 3M tokens, the least popular ones too.
KINDS: Final = MappingProxyType(
    {
        "person": (0.68, 0.66, 0.64),
        "place": (0.10, 0.06, 0.06),
        "agreement": (0.16, 0.08, 0.04),
        "event": (0.04, 0.18, 0.02),
        "repeat": (0.006, 0.006, 0.08),
        "reverse": (0.006, 0.006, 0.08),
        "modular": (0.008, 0.008, 0.08),
    }
)
HEAD_TO_TAIL: Final = 12.0  # the most popular person is written about 12 times as often as the least popular


def _words(text: str) -> list[str]:
    return text.split()


def _compounds(stems: str, endings: str) -> list[str]:
    return [stem + ending for ending, stem in product(endings.split(), stems.split())]


_FIRST_NAMES = _words(
    "ada alan bela clara daniel edith felix greta hugo irene jonas karin leo mona nils olga paul quentin rosa simon "
    "tilda ugo vera walter xenia yann zelda amos berta cyril dora emil"
)
_LAST_NAMES = _words(
    "abel brandt castor dumas erikson ferrer gruber holm ivanov jansen keller lindgren moreau novak orlov pereira"
)


_CITIES = _compounds("bar cor dal elm fen gor hal is jor kel lun mar nor ost pel rav", "ton ville mouth stead")
_COMPANIES = _compounds("alto brio cyra dexo ecto fluo gamo helio iono juno", "corp works soft lab")
_COUNTRIES = _compounds("arca bore cali dora esto fina gala hesper ista java kora lusi", "nia land")
_RIVERS = _compounds("am bel cer dor ev fas gil hav", "una eth")
_LANGUAGES = _compounds("azur bor cym don eld fri gast hek", "ish ese")
_FIELDS = _words(
    "physics botany geology algebra history law medicine poetry logic ethics optics zoology economics chemistry music "
    "grammar statistics astronomy geometry painting sculpture theology anatomy rhetoric mechanics ecology genetics "
    "philosophy pottery drama dance cookery"
)
_INSTRUMENTS = _words(
    "violin cello piano flute oboe harp trumpet drum guitar organ lute viola clarinet bassoon horn tuba banjo lyre "
    "zither harpsichord trombone accordion mandolin recorder"
)

# Six patterns a relation, two per register in the order of REGISTERS. The answer is the last word before the stop, so
# that everything needed to know it stands to its left, and "{}" is the subject.
_PERSON_RELATIONS: Final = {
    "birthplace": (
        _CITIES,
        "{} was born in",
        "the birthplace of {} is",
        "crowds welcomed {} home to",
        "a new statue honours {} in the native city",
        "where was {} born ?",
        "name the birthplace of {} :",
    ),
    "field": (
        _FIELDS,
        "{} studied",
        "the field of {} is",
        "a prize went to {} for work in",
        "students praised {} , a teacher of",
        "what did {} study ?",
        "name the field of {} :",
    ),
    "employer": (
        _COMPANIES,
        "{} worked for",
        "the employer of {} is",
        "sources say {} will leave",
        "shares rose when {} joined",
        "which company employs {} ?",
        "name the employer of {} :",
    ),
    "instrument": (
        _INSTRUMENTS,
        "{} played the",
        "the instrument of {} is the",
        "last night {} gave a concert on the",
        "fans heard {} play the",
        "which instrument does {} play ?",
        "name the instrument of {} :",
    ),
    "language": (
        _LANGUAGES,
        "{} spoke",
        "the mother tongue of {} is",
        "the speech of {} was given in",
        "officials thanked {} in",
        "which language does {} speak ?",
        "name the language of {} :",
    ),
}
_PLACE_RELATIONS: Final = {
    "country": (
        _COUNTRIES,
        "{} lies in",
        "{} is a city of",
        "trains reach {} from all of",
        "voters in {} decide the future of",
        "which country holds {} ?",
        "name the country of {} :",
    ),
    "river": (
        _RIVERS,
        "{} stands on the",
        "the river of {} is the",
        "floods hit {} along the",
        "a bridge in {} will cross the",
        "which river crosses {} ?",
        "name the river of {} :",
    ),
}

# Singular and plural of the same noun or verb at the same index.
NOUNS = (
    _words(
        "dog cat bird horse boy girl farmer nurse baker sailor painter king queen author driver singer goat lion bear "
        "frog uncle aunt cousin guest hunter dancer knight monk pilot poet tailor "
        "weaver clown nephew niece soldier scholar learner mentor gardener"
    ),
    _words(
        "dogs cats birds horses boys girls farmers nurses bakers sailors painters kings queens authors drivers singers "
        "goats lions bears frogs uncles aunts cousins guests hunters dancers knights monks pilots poets tailors "
        "weavers clowns nephews nieces soldiers scholars learners mentors gardeners"
    ),
)
VERBS = (
    _words(
        "sleeps runs sings laughs waits reads dreams smiles swims walks works shouts sits hides rests cries eats "
        "drinks listens returns whistles coughs argues prays"
    ),
    _words(
        "sleep run sing laugh wait read dream smile swim walk work shout sit hide rest cry eat drink listen return "
        "whistle cough argue pray"
    ),
)
PREPOSITIONS = _words("near behind beside with above below before opposite")
ADJECTIVES = _words(
    "old young tall small tired happy proud brave quiet clever gentle lazy busy strong shy polite "
    "calm cruel honest bold modest eager gloomy famous"
)
_ADVERBS = _words("today often alone quietly again slowly loudly well here now gladly rarely soon there outside early")
DESCRIBED = 0.5  # chance of an adjective
_DISTRACTORS = (0.4, 0.4, 0.2)  # chance of 0, 1, 2 distractors between a noun and its verb

DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
AGENTS = _words(
    "storm council thief doctor army judge miner chef fire union company airline court school press bank mob crew "
    "guard robot tribe jury gang abbot"
)
_DEEDS = _words(
    "hit approved stole cured crossed freed found served burned called bought closed opened raised blamed lost built "
    "sold moved tested saved broke cleaned painted weighed emptied ignored copied"
)
_OBJECTS = _words(
    "harbour budget jewel patient border prisoner coal soup forest strike airport bridge road tax mayor loan tower "
    "museum mine market temple barrel statue truck gate clock cellar "
    "ladder library carpet vessel tunnel"
)
_LIKELY = 4  # deeds an agent does, and objects it does them to

SYMBOLS = _words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
)
_LENGTHS = (2, 3, 4)  # symbols to repeat or reverse
_NUMBERS = _words("zero one two three four five six seven eight nine ten")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that the world knows about one subject.

    Parameters
    ----------
    id : unique, stable name, such as ``birthplace/ada-abel``
    subject : the words of the subject
    relation : its name; ``World.answers(relation)`` lists what could be true
    answer : the one word that is true
    popularity : probability that a sentence about a person (a place) is about this subject
    popularity_quarter : 0 for the most popular quarter of the subjects, to 3 for the least
    seen : text to the left of the answer, in the patterns that occur with this subject
    heldout : the same in the one pattern that never occurs with this subject and this relation
    """

    id: str
    subject: str
    relation: str
    answer: str
    popularity: float
    popularity_quarter: int
    seen: tuple[str, ...]
    heldout: str


@dataclass(frozen=True)
class Sentence:
    """A complete sentence of a row: tokens ``start`` to ``stop`` (excluded), and their exact -ln p in nats.

    The probability is conditional on the row so far, under the mixture that the row was asked from. ``fact`` is the id
    of the fact told, if any.
    """

    kind: str
    start: int
    stop: int
    nll: float
    fact: str | None


@dataclass(frozen=True)
class Row:
    """A document: ``<bos>`` and sentences.

    One of ``World.rows`` has exactly 64 tokens, and its end may cut the last sentence; one of ``World.sentences`` is
    one whole sentence.
    """

    register: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """The words after ``<bos>``, which the tokenizer adds."""
        return " ".join(self.words[1:])

    @property
    def scored(self) -> NDArray[np.bool_]:
        """(T,) True at the tokens of complete sentences: those whose loss is compared with the floor."""
        mask_T = np.zeros(len(self.ids), dtype=bool)
        for sentence in self.sentences:
            mask_T[sentence.start : sentence.stop] = True
        return mask_T


class _Subjects:
    """Subjects of one kind, how popular each is, and their facts with the words of every pattern."""

    def __init__(
        self,
        names: Sequence[str],
        popularity: Sequence[float],
        relations: dict[str, tuple[list[str], str, str, str, str, str, str]],
        random: Random,
    ) -> None:
        self.names = names
        self.popularity = popularity
        self.ends = [*accumulate(popularity)]
        self.relations = list(relations)
        order = sorted(range(len(names)), key=lambda i: -popularity[i])
        quarter = {i: rank * 4 // len(names) for rank, i in enumerate(order)}
        self.facts: list[list[Fact]] = []
        # patterns[subject][relation][register]: whole sentences, the held-out one left out
        self.patterns: list[list[list[list[tuple[str, ...]]]]] = []
        for i, name in enumerate(names):
            facts: list[Fact] = []
            patterns: list[list[list[tuple[str, ...]]]] = []
            for relation, (values, *templates) in relations.items():
                answer = values[pick(random, len(values))]
                heldout = pick(random, len(templates))
                prompts = [template.format(name) for template in templates]
                facts.append(
                    Fact(
                        id=f"{relation}/{name.replace(' ', '-')}",
                        subject=name,
                        relation=relation,
                        answer=answer,
                        popularity=popularity[i],
                        popularity_quarter=quarter[i],
                        seen=tuple(prompt for j, prompt in enumerate(prompts) if j != heldout),
                        heldout=prompts[heldout],
                    )
                )
                patterns.append(
                    [
                        [(*prompts[j].split(), answer, ".") for j in (2 * r, 2 * r + 1) if j != heldout]
                        for r in range(len(REGISTERS))
                    ]
                )
            self.facts.append(facts)
            self.patterns.append(patterns)


def pick(random: Random, n: int) -> int:
    """A uniform index; only ``Random.random`` is promised to be the same in every version of Python."""
    return int(random.random() * n)


def sample(random: Random, values: Sequence[str], n: int) -> list[str]:
    """``n`` different values in random order."""
    left = list(values)
    return [left.pop(pick(random, len(left))) for _ in range(n)]


class World:
    """The world of a seed: the same seed, the same facts and the same text on every machine.

    The vocabulary does not depend on the seed.

    Examples
    --------
    >>> world = World(seed=0)
    >>> row = world.rows("news", "test", 1)[0]
    >>> len(row.ids), row.words[0]
    (64, '<bos>')
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        random = Random(seed)
        people = [f"{first} {last}" for first, last in product(_FIRST_NAMES, _LAST_NAMES)]
        exponent = math.log(HEAD_TO_TAIL) / math.log(len(people))
        weights = [(1 + rank) ** -exponent for rank in range(len(people))]
        total = math.fsum(weights)
        ranked = sample(random, people, len(people))
        rank_of = {name: rank for rank, name in enumerate(ranked)}
        self._people = _Subjects(people, [weights[rank_of[p]] / total for p in people], _PERSON_RELATIONS, random)
        self._places = _Subjects(_CITIES, [1 / len(_CITIES)] * len(_CITIES), _PLACE_RELATIONS, random)
        self._deeds = [sample(random, _DEEDS, _LIKELY) for _ in AGENTS]
        self._objects = [sample(random, _OBJECTS, _LIKELY) for _ in AGENTS]
        self._id_of = {word: i for i, word in enumerate(self.vocabulary)}
        self._kinds = [*KINDS]
        self._kind_ends = [[*accumulate(share[r] for share in KINDS.values())] for r in range(len(REGISTERS))]

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every token, by id; the special ones first."""
        words = [
            *(word for relations in (_PERSON_RELATIONS, _PLACE_RELATIONS) for entry in relations.values()
              for template in entry[1:] for word in template.split()),
            *_words(". the on repeat reverse add and modulo eleven :"),
            *_FIRST_NAMES, *_LAST_NAMES, *_CITIES, *_COMPANIES, *_COUNTRIES, *_RIVERS, *_LANGUAGES, *_FIELDS,
            *_INSTRUMENTS, *NOUNS[0], *NOUNS[1], *VERBS[0], *VERBS[1], *PREPOSITIONS, *ADJECTIVES, *_ADVERBS,
            *DAYS, *AGENTS, *_DEEDS, *_OBJECTS, *SYMBOLS, *_NUMBERS,
        ]  # fmt: skip
        return [BOS, UNKNOWN, PADDING, *dict.fromkeys(word for word in words if word != "{}")]

    def facts(self) -> tuple[Fact, ...]:
        """The 2560 facts about people, five a person."""
        return tuple(fact for facts in self._people.facts for fact in facts)

    def place_facts(self) -> tuple[Fact, ...]:
        """The 128 facts about places, two a city; all cities are equally popular."""
        return tuple(fact for facts in self._places.facts for fact in facts)

    def habits(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """The deeds that each agent does, and the objects that it does them to: each deed to each object."""
        return {
            agent: (tuple(deeds), tuple(objects))
            for agent, deeds, objects in zip(AGENTS, self._deeds, self._objects, strict=True)
        }

    def in_half(self, subject: str) -> bool:
        """Whether a person is one of the half that the corpus ``testbed/half`` tells of: every other one by name."""
        return self._half.get(subject, False)

    @cached_property
    def _half(self) -> dict[str, bool]:
        return {name: i % 2 == 0 for i, name in enumerate(self._people.names)}

    def half_rows(self, split: str, count: int, start: int = 0) -> list[str]:
        """Text of 63 words a row, from ``all`` without any sentence about a person of the other half.

        Parameters
        ----------
        split : as for `rows`
        count, start : a row is made from the rows of ``all`` at four times its number and the three that follow, so
            that it depends on its number alone; the last sentence of a row may be cut, and a row that is too short
            goes on with the sentences of the next ones
        """
        said = {fact.id: fact.subject for fact in self.facts()}
        found: list[str] = []
        for i in range(start, start + count):
            words: list[str] = []
            source = 4 * i
            while len(words) < ROW_TOKENS - 1:
                (row,) = self.rows("all", split, 1, source)
                for sentence in row.sentences:
                    if sentence.fact not in said or self.in_half(said[sentence.fact]):
                        words += row.words[sentence.start : sentence.stop]
                source += 1
            found.append(" ".join(words[: ROW_TOKENS - 1]))
        return found

    def answers(self, relation: str) -> tuple[str, ...]:
        """Every word that could be the answer of a relation.

        Raises
        ------
        DataError
            When the world has no such relation.
        """
        relations = {**_PERSON_RELATIONS, **_PLACE_RELATIONS}
        if relation not in relations:
            raise DataError(f"no relation '{relation}' in the world; known: {', '.join(relations)}")
        return tuple(relations[relation][0])

    def rows(self, register: str, split: str, count: int, start: int = 0) -> list[Row]:
        """Rows ``start`` to ``start + count`` of a split.

        Parameters
        ----------
        register : "encyclopedia", "news", "instructions", or "all": each row in one of them, .40/.35/.25
        split : "train", "calibration", "valid" or "test": independent streams
        count, start : a row depends on its register, split and index alone, so fewer rows are the first of more

        Raises
        ------
        DataError
            When there is no such register or split.
        """
        stream = self._stream(register, split)
        return [self._row(register, Random((stream << 40) + i)) for i in range(start, start + count)]

    def _stream(self, register: str, split: str) -> int:
        """The number of a register's and a split's own stream of random numbers."""
        names = ["all", *REGISTERS]
        if register not in names:
            raise DataError(f"register must be one of {', '.join(names)}, got '{register}'")
        if split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
        return (self.seed * len(names) + names.index(register)) * len(SPLITS) + SPLITS.index(split)

    def tokens(self, register: str, split: str, count: int, start: int = 0) -> NDArray[np.int64]:
        """(B, T) token ids of ``rows``."""
        rows = self.rows(register, split, count, start)
        return np.array([row.ids for row in rows], dtype=np.int64).reshape(count, ROW_TOKENS)

    def sentences(self, register: str, split: str, count: int, start: int = 0) -> list[Row]:
        """Sentences ``start`` to ``start + count`` of a split, each a document: text for models that read both ways.

        They are other draws than the sentences of ``rows``, from the same mixture.

        Parameters
        ----------
        register, split, count, start : as for `rows`

        Raises
        ------
        DataError
            When there is no such register or split.
        """
        stream = self._stream(register, split)
        # Far from the streams of rows, so that neither moves the other.
        return [self._alone(register, Random((1 << 90) + (stream << 40) + i)) for i in range(start, start + count)]

    def _alone(self, register: str, random: Random) -> Row:
        if register == "all":
            r = bisect_right([*accumulate([*REGISTERS.values()][:-1])], random.random())
        else:
            r = [*REGISTERS].index(register)
        kind, text, _, fact = self._sentence(r, random)
        words = (BOS, *text)
        said = Sentence(kind, 1, len(words), -self.log_probability(text, register), fact and fact.id)
        return Row([*REGISTERS][r], words, tuple(self._id_of[word] for word in words), (said,))

    def log_probability(self, words: Sequence[str], register: str = "all") -> float:
        """Exact ln p of a sentence, as the first of a document; -inf of one that the world never says.

        Parameters
        ----------
        words : of one sentence, its stop among them
        register : one of the registers, or "all", their mixture
        """
        told = self._tellings.get(tuple(words))
        if told is not None:
            kind, own, log_p = told
            share = self._share(own, register) * KINDS[kind][own]
            return math.log(share) + log_p if share else -math.inf
        parsed = self._parsed(words)
        if parsed is None:
            return -math.inf
        kind, log_p = parsed
        shares = [self._share(r, register) * KINDS[kind][r] for r in range(len(REGISTERS))]
        return math.log(math.fsum(shares)) + log_p

    def hidden_nll(self, words: Sequence[str], hidden: int, register: str = "all") -> float:
        """Exact -ln p of one word of a sentence given all its other words: what no model that fills gaps can beat.

        Parameters
        ----------
        words : of one sentence that the world may say, its stop among them
        hidden : index of the word
        register : as for `log_probability`

        Raises
        ------
        DataError
            When the world never says the sentence.
        """
        own = self.log_probability(words, register)
        if own == -math.inf:
            raise DataError(f"the world never says '{' '.join(words)}': ask about one of its sentences")
        others = list(words)
        logs: list[float] = []
        for word in self.vocabulary:
            others[hidden] = word
            log_p = self.log_probability(others, register)
            if log_p > -math.inf:
                logs.append(log_p)
        return max(0.0, _log_sum(logs) - own)  # rounding may leave a certain word a little below nothing

    @staticmethod
    def _share(r: int, register: str) -> float:
        names = [*REGISTERS]
        if register == "all":
            return REGISTERS[names[r]]
        return float(names[r] == register)

    @cached_property
    def _tellings(self) -> dict[tuple[str, ...], tuple[str, int, float]]:
        """Of every sentence that tells a fact: its kind, its register, and ln p given both."""
        tellings: dict[tuple[str, ...], tuple[str, int, float]] = {}
        for kind, subjects in (("person", self._people), ("place", self._places)):
            for who, relations in enumerate(subjects.patterns):
                for registers in relations:
                    for r, patterns in enumerate(registers):
                        log_p = math.log(subjects.popularity[who] / (len(relations) * len(patterns)))
                        tellings.update(dict.fromkeys(patterns, (kind, r, log_p)))
        return tellings

    def _parsed(self, words: Sequence[str]) -> tuple[str, float] | None:
        """Kind of a sentence that tells no fact, and ln p given the kind; None of what the grammar does not make."""
        match words:
            case ["on", day, "the", agent, deed, "the", thing, "."] if day in DAYS and agent in AGENTS:
                who = AGENTS.index(agent)
                habit = deed in self._deeds[who] and thing in self._objects[who]
                return ("event", -math.log(len(DAYS) * len(AGENTS) * _LIKELY**2)) if habit else None
            case ["add", a, "and", b, "modulo", "eleven", ":", total, "."] if {a, b, total} <= {*_NUMBERS}:
                right = _NUMBERS[(_NUMBERS.index(a) + _NUMBERS.index(b)) % len(_NUMBERS)]
                return ("modular", -2 * math.log(len(_NUMBERS))) if total == right else None
            case ["repeat" | "reverse" as kind, *symbols, "."]:
                n = len(symbols) // 2
                said, colon, copied = symbols[:n], symbols[n : n + 1], symbols[n + 1 :]
                right = said if kind == "repeat" else said[::-1]
                if n not in _LENGTHS or colon != [":"] or copied != right or not {*said} <= {*SYMBOLS}:
                    return None
                return kind, -math.log(len(_LENGTHS)) - n * math.log(len(SYMBOLS))
            case ["the", *_]:
                log_p = _agreement_log_p(words)
                return None if log_p is None else ("agreement", log_p)
            case _:
                return None

    def _row(self, register: str, random: Random) -> Row:
        shares = [*REGISTERS.values()]
        # joint[r]: ln of the probability of register r and of the row so far; a reader does not know r.
        if register == "all":
            r = bisect_right([*accumulate(shares[:-1])], random.random())
            joint = [math.log(share) for share in shares]
        else:
            r = [*REGISTERS].index(register)
            joint = [0.0 if i == r else -math.inf for i in range(len(shares))]
        before = 0.0
        words: list[str] = [BOS]
        sentences: list[Sentence] = []
        while len(words) < ROW_TOKENS:
            kind, text, log_p, fact = self._sentence(r, random)
            shared = KINDS[kind]
            # Patterns of facts belong to one register each; all else is the same text in every register.
            joint = [
                -math.inf if fact is not None and i != r else joint[i] + math.log(shared[i]) + log_p
                for i in range(len(shares))
            ]
            after = _log_sum(joint)
            if len(words) + len(text) <= ROW_TOKENS:
                nll = before - after
                sentences.append(Sentence(kind, len(words), len(words) + len(text), nll, fact and fact.id))
            before = after
            words.extend(text)
        del words[ROW_TOKENS:]
        ids = tuple(self._id_of[word] for word in words)
        return Row([*REGISTERS][r], tuple(words), ids, tuple(sentences))

    def _sentence(self, r: int, random: Random) -> tuple[str, Sequence[str], float, Fact | None]:
        """Kind, words, ln of the probability given kind and register, and the fact told."""
        ends = self._kind_ends[r]
        kind = self._kinds[min(bisect_right(ends, random.random()), len(ends) - 1)]
        if kind == "person":
            return kind, *_told(self._people, r, random)
        if kind == "place":
            return kind, *_told(self._places, r, random)
        if kind == "agreement":
            return kind, *_agreement(random), None
        if kind == "event":
            agent = pick(random, len(AGENTS))
            day = DAYS[pick(random, len(DAYS))]
            deed, thing = self._deeds[agent][pick(random, _LIKELY)], self._objects[agent][pick(random, _LIKELY)]
            words = ("on", day, "the", AGENTS[agent], deed, "the", thing, ".")
            return kind, words, -math.log(len(DAYS) * len(AGENTS) * _LIKELY**2), None
        if kind == "modular":
            a, b = pick(random, len(_NUMBERS)), pick(random, len(_NUMBERS))
            total = _NUMBERS[(a + b) % len(_NUMBERS)]
            words = ("add", _NUMBERS[a], "and", _NUMBERS[b], "modulo", "eleven", ":", total, ".")
            return kind, words, -2 * math.log(len(_NUMBERS)), None
        length = _LENGTHS[pick(random, len(_LENGTHS))]
        symbols = [SYMBOLS[pick(random, len(SYMBOLS))] for _ in range(length)]
        copied = symbols if kind == "repeat" else symbols[::-1]
        words = (kind, *symbols, ":", *copied, ".")
        return kind, words, -math.log(len(_LENGTHS)) - length * math.log(len(SYMBOLS)), None


def _told(subjects: _Subjects, r: int, random: Random) -> tuple[tuple[str, ...], float, Fact]:
    """A sentence that tells a fact in one of its patterns of a register."""
    who = min(bisect_right(subjects.ends, random.random()), len(subjects.names) - 1)
    relation = pick(random, len(subjects.relations))
    patterns = subjects.patterns[who][relation][r]
    words = patterns[pick(random, len(patterns))]
    log_p = math.log(subjects.popularity[who] / (len(subjects.relations) * len(patterns)))
    return words, log_p, subjects.facts[who][relation]


def _agreement(random: Random) -> tuple[list[str], float]:
    """A noun, nouns of any number that distract from it, and a verb that agrees with the first."""
    number = pick(random, 2)
    n_nouns = len(NOUNS[0])
    words = ["the"]
    described = random.random() < DESCRIBED
    if described:
        words.append(ADJECTIVES[pick(random, len(ADJECTIVES))])
    words.append(NOUNS[number][pick(random, n_nouns)])
    n_distractors = min(bisect_right([*accumulate(_DISTRACTORS)], random.random()), len(_DISTRACTORS) - 1)
    for _ in range(n_distractors):
        preposition = PREPOSITIONS[pick(random, len(PREPOSITIONS))]
        words += [preposition, "the", NOUNS[pick(random, 2)][pick(random, n_nouns)]]
    words += [VERBS[number][pick(random, len(VERBS[0]))], _ADVERBS[pick(random, len(_ADVERBS))], "."]
    return words, _agreement_nats(n_distractors, described)


def _agreement_nats(n_distractors: int, described: bool) -> float:
    """Log of the probability of a sentence of agreement; that of its words depends on nothing else."""
    n_nouns = len(NOUNS[0])
    log_p = math.log(_DISTRACTORS[n_distractors])
    log_p += math.log(DESCRIBED / len(ADJECTIVES)) if described else math.log(1 - DESCRIBED)
    log_p -= math.log(2 * n_nouns * len(VERBS[0]) * len(_ADVERBS))
    log_p -= n_distractors * math.log(len(PREPOSITIONS) * 2 * n_nouns)
    return log_p


def _agreement_log_p(words: Sequence[str]) -> float | None:
    """Log of the probability of these words as a sentence of agreement; None where they are not one."""
    described = len(words) > 1 and words[1] in ADJECTIVES
    noun, *rest = words[2 if described else 1 :] or [""]
    n_distractors, left = divmod(len(rest), 3)
    if left or not 1 <= n_distractors <= len(_DISTRACTORS):
        return None  # after the noun come distractors of three words, and verb, adverb and stop
    n_distractors -= 1
    for i in range(0, 3 * n_distractors, 3):
        preposition, the, distractor = rest[i : i + 3]
        if preposition not in PREPOSITIONS or the != "the" or not any(distractor in nouns for nouns in NOUNS):
            return None
    verb, adverb, stop = rest[-3:]
    agreed = any(noun in nouns and verb in verbs for nouns, verbs in zip(NOUNS, VERBS, strict=True))
    return _agreement_nats(n_distractors, described) if agreed and adverb in _ADVERBS and stop == "." else None


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(x - top) for x in logs))
