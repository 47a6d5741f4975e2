"""Cloze questions asked of any kind of model: each candidate's log-likelihood in the place of the answer.

A masked model answers at its mask, an encoder-decoder after its sentinel (or, taught to write the whole sentence, after
the text before the mask), a causal model at the end of the text. B rows, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from mariotte.data.lama import Probe
from mariotte.data.tokens import separator_of
from mariotte.errors import DataError
from mariotte.models.model import Model

ROWS = 2048
"""Rows of one forward pass at most, and `LOGITS` of them together: bound memory, and change no result."""

LOGITS = 1 << 25

SENTINEL = "<extra_id_0>"
"""The token of T5 and its kind that stands for the first missing span."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A question as a model's tokens.

    Parameters
    ----------
    tokens : what stands before the answer; of a masked model the whole sentence, of an encoder-decoder what the
        decoder has written
    position : of the mask, None where the answer comes next
    source : what an encoder-decoder reads, None elsewhere
    """

    tokens: Tokens
    position: int | None = None
    source: Tokens | None = None


@dataclass(frozen=True)
class Placings:
    """Where the right answers came among the candidates.

    Parameters
    ----------
    above : (n,) int64, candidates scored higher than the right one
    level : (n,) int64, candidates scored as the right one, itself among them
    best : (n,) int64, the candidate scored highest, the first of equals
    logs : (n,) float64, the right one's log-probability in nats, summed over its tokens; None where it was not asked
    """

    above: Tensor
    level: Tensor
    best: Tensor
    logs: Tensor | None = None

    @property
    def ranks(self) -> Tensor:
        """(n,) int64, 1 being first: a tie counts against the model, as in `known`."""
        return self.above + self.level

    def hits(self, k: int) -> Tensor:
        """(n,) float64: whether the answer is among the first `k`; of equals, the chance of it in random order."""
        return ((k - self.above).double() / self.level).clamp(0, 1)

    def reciprocal(self) -> Tensor:
        """(n,) float64: 1 / rank, its mean over the orders of equals."""
        above, level = self.above.double(), self.level.double()
        # The mean of 1 / i over above < i <= above + level.
        spread = (torch.digamma(above + level + 1) - torch.digamma(above + 1)) / level
        return torch.where(self.level == 1, 1 / (above + 1), spread)

    def known(self) -> Tensor:
        """(n,) bool: whether the answer comes first and alone, so that equal scores never look like knowledge."""
        return (self.above == 0) & (self.level == 1)


def place(scores_BC: Tensor, right_B: Tensor, logs_B: Tensor | None = None) -> Placings:
    """Where the right candidates stand by their scores.

    Parameters
    ----------
    scores_BC : of every candidate
    right_B : the right one's index
    logs_B : its log-probability, see `Placings`
    """
    right_B1 = scores_BC.gather(1, right_B[:, None])
    return Placings(
        (scores_BC > right_B1).sum(1).cpu(), (scores_BC == right_B1).sum(1).cpu(), scores_BC.argmax(1).cpu(), logs_B
    )


def plain(ranks: Tensor, logs: Tensor) -> list[tuple[int, float]]:
    """Ranks and probabilities of answers from their log-probabilities, as plain numbers."""
    return [*zip(cast("list[int]", ranks.tolist()), cast("list[float]", logs.exp().tolist()), strict=True)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False) -> list[Tokens]:
    if not texts:
        return []
    found = tokenizer([*texts], add_special_tokens=special, verbose=False)["input_ids"]
    return [tuple(ids) for ids in cast("list[list[int]]", found)]


class Asker:
    """Turns probes and answers into a model's tokens, by the model's kind."""

    def __init__(self, model: Model) -> None:
        if model.tokenizer is None:
            raise DataError(f"{model.name} has no tokenizer: put tokenizer.json into its folder to ask it for facts")
        self.kind: str = model.kind
        self.name, self.tokenizer, self.config = model.name, model.tokenizer, model.config
        self.longest = model.longest

    @property
    def filler(self) -> str:
        """What stands in the place of the answer where a model reads the whole sentence."""
        if self.kind == "seq2seq" and SENTINEL in cast("Mapping[str, int]", self.tokenizer.get_vocab()):
            return SENTINEL
        mask = cast("str | None", self.tokenizer.mask_token)
        if mask is None:
            wanted = f"a mask token or {SENTINEL}" if self.kind == "seq2seq" else "a mask token"
            raise DataError(f"the tokenizer of {self.name} must have {wanted} to be asked for facts, and has none")
        return mask

    def fits(self, probe: Probe) -> bool:
        """Whether this kind of model can be asked in these words: a causal one needs the answer last."""
        return self.kind != "causal" or not any(c.isalnum() for c in probe.after)

    def _start(self) -> int:
        for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            if isinstance(found := self.config.get(key), int):
                return found
        raise DataError(f"the config of {self.name} must state decoder_start_token_id, and does not: add it")

    def prompts(self, probes: Sequence[Probe]) -> list[Prompt]:
        """The questions; a mask that the tokenizer does not keep whole is refused."""
        if self.kind == "causal":
            separator = separator_of(self.tokenizer)
            first = () if separator is None else (separator,)
            return [Prompt((*first, *ids)) for ids in _ids(self.tokenizer, [probe.before.rstrip() for probe in probes])]
        filler = self.filler
        wanted = cast(int, self.tokenizer.convert_tokens_to_ids(filler))
        read = _ids(self.tokenizer, [probe.sentence(filler) for probe in probes], special=True)
        for probe, ids in zip(probes, read, strict=True):
            if ids.count(wanted) != 1:
                raise DataError(
                    f"the tokenizer of {self.name} must keep {filler} as one token, and in {probe.sentence(filler)!r} "
                    f"it gives {ids.count(wanted)}: repair its special tokens"
                )
        if self.kind == "masked":
            return [Prompt(ids, ids.index(wanted)) for ids in read]
        start = self._start()
        if filler == SENTINEL:  # such a model writes the missing span alone
            return [Prompt((start, wanted), source=source) for source in read]
        # One taught with masks writes the sentence anew, its end left out here.
        end = cast("int | None", self.tokenizer.eos_token_id)
        written = _ids(self.tokenizer, [probe.before.rstrip() for probe in probes], special=True)
        return [
            Prompt((start, *(ids[:-1] if ids[-1:] == (end,) else ids)), source=source)
            for ids, source in zip(written, read, strict=True)
        ]

    def answers(self, probe: Probe, answers: Sequence[str]) -> list[Tokens | None]:
        """What each answer's tokens are in the place of the answer; None where it has none of its own.

        Parameters
        ----------
        probe : the sentence that the answers are put into: what they are does not depend on its subject

        Notes
        -----
        A masked model's answers are single tokens: those that change the sentence's tokens in the place of the mask
        alone. None too for what the tokenizer does not know.
        """
        strange = cast("int | None", self.tokenizer.unk_token_id)
        if self.kind == "masked":
            prompt = self.prompts([probe])[0]
            here = cast(int, prompt.position)
            whole = _ids(self.tokenizer, [probe.sentence(answer) for answer in answers], special=True)
            around = (prompt.tokens[:here], prompt.tokens[here + 1 :])
            found = [ids[here : len(ids) - len(around[1])] for ids in whole]
            return [
                one if len(one) == 1 and (ids[:here], ids[here + 1 :]) == around and strange not in one else None
                for one, ids in zip(found, whole, strict=True)
            ]
        # As the words stand in the sentence, behind a sentinel too: the span that it stands for was cut out of one.
        left = probe.before.rstrip()
        space = " " if left != probe.before else ""
        before = _ids(self.tokenizer, [left])[0] if left else ()
        whole = _ids(self.tokenizer, [f"{left}{space}{answer}" for answer in answers])
        return [
            ids[len(before) :]
            if ids[: len(before)] == before and len(ids) > len(before) and strange not in ids[len(before) :]
            else None
            for ids in whole
        ]

    def room(self, prompt: Prompt, answer: Tokens) -> bool:
        """Whether the model has positions for a prompt with an answer."""
        if self.longest is None:
            return True
        extra = 0 if prompt.position is not None else len(answer)
        return max(len(prompt.tokens) + extra, len(prompt.source or ())) <= self.longest


@dataclass(frozen=True)
class _Level:
    """Beginnings of candidates of one length, which are computed once whoever shares them.

    Parameters
    ----------
    tokens : the last token of each of U beginnings; of the empty beginning nothing
    parents : index of what comes before it among the shorter ones
    candidates, nodes, following : of each candidate that is longer: its index, that of its beginning, its next token
    """

    tokens: list[int]
    parents: list[int]
    candidates: list[int]
    nodes: list[int]
    following: list[int]


def _levels(candidates: Sequence[Tokens]) -> list[_Level]:
    levels: list[_Level] = []
    known: dict[Tokens, int] = {}
    for depth in range(max(map(len, candidates))):
        nodes: dict[Tokens, int] = {}
        longer = [i for i, candidate in enumerate(candidates) if len(candidate) > depth]
        for i in longer:
            nodes.setdefault(candidates[i][:depth], len(nodes))
        levels.append(
            _Level(
                tokens=[node[-1] for node in nodes if node],
                parents=[known[node[:-1]] for node in nodes if node],
                candidates=longer,
                nodes=[nodes[candidates[i][:depth]] for i in longer],
                following=[candidates[i][depth] for i in longer],
            )
        )
        known = nodes
    return levels


def _slices(candidates: Sequence[Tokens], rows: int) -> Iterator[range]:
    """Runs of candidates of which no more than `rows` need a row of their own beside the prompt's."""
    start, long = 0, 0
    for i, candidate in enumerate(candidates):
        if len(candidate) > 1 and long == rows:
            yield range(start, i)
            start, long = i, 0
        long += len(candidate) > 1
    yield range(start, len(candidates))


def batches(model: Model, prompts: Sequence[Prompt], rows: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Prompts of one length together, without padding or mask: their indices, and what the model is called with."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt.tokens), len(prompt.source or ())].append(index)
    for indices in groups.values():
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            tokens_BT = torch.tensor([prompts[i].tokens for i in chosen], device=model.device)
            if prompts[chosen[0]].source is None:
                yield chosen, {"input_ids": tokens_BT}
            else:
                sources_BS = torch.tensor([prompts[i].source for i in chosen], device=model.device)
                yield chosen, {"input_ids": sources_BS, "decoder_input_ids": tokens_BT}


class _Run:
    """One batch of prompts and what follows them, the prompts computed once."""

    def __init__(self, model: Model, inputs: dict[str, Any], chosen: Sequence[Prompt], keep: bool) -> None:
        self.model, self.rows = model, len(chosen)
        self.encoded: Tensor | None = None
        if chosen[0].position is not None:
            logits_BTV = model.hf(**inputs).logits
            positions_B = torch.tensor([cast(int, prompt.position) for prompt in chosen], device=model.device)
            self.logits_BV = logits_BTV[torch.arange(self.rows, device=model.device), positions_B].float()
            return
        last = {} if "decoder_input_ids" in inputs else {"logits_to_keep": 1}
        found = model.hf(**inputs, **last, use_cache=keep)
        self.logits_BV = found.logits[:, -1].float()
        self.cache = found.past_key_values if keep else None
        self.encoded = found.encoder_last_hidden_state if "decoder_input_ids" in inputs else None

    def follow(self, level: _Level, before: int) -> Tensor:
        """Logits behind the beginnings of one length, (B, U, V), from those of the length before.

        Parameters
        ----------
        before : beginnings a prompt in the last call
        """
        device = self.model.device
        parents_U = torch.tensor(level.parents, device=device)
        index = (torch.arange(self.rows, device=device)[:, None] * before + parents_U).flatten()
        cast(Any, self.cache).batch_select_indices(index)
        tokens = torch.tensor(level.tokens, device=device).repeat(self.rows)[:, None]
        if self.encoded is None:
            found = self.model.hf(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        else:
            self.encoded = self.encoded[index]
            found = self.model.hf(
                encoder_outputs=BaseModelOutput(last_hidden_state=cast(Any, self.encoded)),
                decoder_input_ids=tokens,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache = found.past_key_values
        return found.logits[:, -1].float().unflatten(0, (self.rows, -1))


@torch.no_grad()
def log_likelihoods(
    model: Model, prompts: Sequence[Prompt], candidates: Sequence[Tokens], *, per_token: bool = False, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """Log-probability of every candidate after every prompt, in nats.

    Parameters
    ----------
    prompts : n questions of any lengths
    candidates : C answers of at least one token each, all different
    per_token : divide each sum by the candidate's tokens
    rows : in one forward pass

    Returns
    -------
    (n, C) float64 on the CPU, and (n,) int64, the likeliest single token of the whole vocabulary, the first of equals

    Notes
    -----
    A prompt is computed once, and so is every beginning that several candidates share: candidates are followed token by
    token from the prompt's keys and values. The logarithm is taken in float32, as in `token_nll`.
    """
    scores = torch.zeros(len(prompts), len(candidates), dtype=torch.float64)
    free = torch.zeros(len(prompts), dtype=torch.int64)
    width = max(1, min(rows, LOGITS // model.shape.vocab))
    lengths_C = torch.tensor([len(candidate) for candidate in candidates])
    for part in _slices(candidates, width):
        levels = _levels([candidates[i] for i in part])
        widest = max(1, *(len(level.tokens) for level in levels))
        for chosen, inputs in batches(model, prompts, max(1, width // widest)):
            run = _Run(model, inputs, [prompts[i] for i in chosen], keep=len(levels) > 1)
            free[chosen] = run.logits_BV.argmax(1).cpu()
            found = torch.zeros(len(chosen), len(part), dtype=torch.float64)
            logits_BUV, before = run.logits_BV[:, None], 1
            for level in levels:
                if level.tokens:
                    logits_BUV = run.follow(level, before)
                    before = len(level.tokens)
                asked_BM = logits_BUV[:, level.nodes, level.following] - logits_BUV.logsumexp(-1)[:, level.nodes]
                found[:, level.candidates] += asked_BM.double().cpu()
            scores[chosen, part.start : part.stop] = found
    return scores / lengths_C if per_token else scores, free


@torch.no_grad()
def vocabulary_placings(
    model: Model, prompts: Sequence[Prompt], right: Sequence[int], among: Sequence[int] | None = None
) -> Placings:
    """Where one-token answers stand in the whole vocabulary, or among some tokens of it.

    Parameters
    ----------
    right : the answers' token ids
    among : token ids of the candidates, the answers among them; None takes the whole vocabulary
    """
    above, level, best = (torch.zeros(len(prompts), dtype=torch.int64) for _ in range(3))
    logs = torch.zeros(len(prompts), dtype=torch.float64)
    index = None if among is None else {token: i for i, token in enumerate(among)}
    kept = None if among is None else torch.tensor([*among], device=model.device)
    for chosen, inputs in batches(model, prompts, max(1, min(ROWS, LOGITS // model.shape.vocab))):
        run = _Run(model, inputs, [prompts[i] for i in chosen], keep=False)
        logits_BC = run.logits_BV if kept is None else run.logits_BV[:, kept]
        wanted = [right[i] if index is None else index[right[i]] for i in chosen]
        one = place(logits_BC, torch.tensor(wanted, device=model.device))
        above[chosen], level[chosen], best[chosen] = one.above, one.level, one.best
        tokens_B1 = torch.tensor([[right[i]] for i in chosen], device=model.device)
        logs[chosen] = (run.logits_BV.gather(1, tokens_B1)[:, 0] - run.logits_BV.logsumexp(1)).double().cpu()
    return Placings(above, level, best, logs)
