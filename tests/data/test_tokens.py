from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mariotte.data import corpora, tokens
from mariotte.errors import DataError
from mariotte.models.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    found = load_tokenizer(model_folder)
    assert found is not None
    return found


def test_documents_are_joined_with_a_separator_and_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer.convert_ids_to_tokens([10, 11, 12, 13, 14])
    (tmp_path / "test.txt").write_text(f"{words[0]} {words[1]}\n\n{words[2]}\n\n{words[3]} {words[4]}")
    found = tokens.read(corpora.find(f"file:{tmp_path}"), "test", tokenizer, 4)
    bos = tokenizer.bos_token_id
    assert found.tokens.tolist() == [[bos, 10, 11, bos], [12, bos, 13, 14]]
    lengths = [len(word) for word in words]
    # The space before a word counts with the word: every byte of a document belongs to one token.
    assert found.n_bytes.tolist() == [[0, lengths[0], 1 + lengths[1], 0], [lengths[2], 0, lengths[3], 1 + lengths[4]]]
    assert found.protocol()["separator"] == "<bos>"


def test_bytes_are_utf8_bytes(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data/models/stories260K")
    assert tokenizer is not None
    corpus = corpora.find(f"file:{shared / 'data/tinystories/tinystories_sample.txt'}")
    found = tokens.read(corpus, "test", tokenizer, 64)
    text_bytes = sum(len(d.encode()) for d in corpus.documents("test"))
    # All but what did not fill the last row.
    assert text_bytes - 64 * 20 < int(found.n_bytes.sum()) <= text_bytes


def test_a_smaller_count_is_a_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = corpora.find("testbed/all")
    few, more = (tokens.read(corpus, "calibration", tokenizer, 64, n) for n in (5, 9))
    assert torch.equal(more.tokens[:5], few.tokens)
    assert few.sha256 != more.sha256


def test_at_most_takes_what_there_is(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "test.txt").write_text("one two three " * 10)  # 31 tokens
    corpus = corpora.find(f"file:{tmp_path}")
    everything = tokens.blocks(corpus, "test", tokenizer, 8)
    for count, rows in ((2, 2), (3, 3), (50, 3)):
        assert torch.equal(tokens.blocks(corpus, "test", tokenizer, 8, count, at_most=True), everything[:rows])
    with pytest.raises(DataError, match="holds 31 tokens, fewer than one block of 64"):
        tokens.blocks(corpus, "test", tokenizer, 64, 50, at_most=True)


def test_a_few_rows_are_had_without_reading_the_rest(tokenizer: PreTrainedTokenizerBase) -> None:
    handed_out: list[str] = []

    class Long(corpora.Corpus):
        def fingerprint(self, split: corpora.Split) -> str:
            return "long"

        def documents(self, split: corpora.Split) -> Iterator[str]:
            for i in range(200):
                handed_out.append(f"{i} " + "the town of " * 4_000)
                yield handed_out[-1]

    corpus = Long("long")
    few = tokens.blocks(corpus, "train", tokenizer, 64, 2)
    assert sum(map(len, handed_out)) < 2 * tokens.CHARACTERS_AT_ONCE
    assert torch.equal(tokens.blocks(corpus, "train", tokenizer, 64, 3_000)[:2], few)


def test_testbed_documents_are_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    found = tokens.blocks(corpora.find("testbed/news"), "test", tokenizer, 64, 20)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    assert (found[:, 1:] != tokenizer.bos_token_id).all()
    assert (found != tokenizer.unk_token_id).all()


def test_an_empty_corpus_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "test.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds 0 tokens, fewer than one block of 64: it is empty"):
        tokens.read(corpora.find(f"file:{tmp_path}"), "test", tokenizer, 64)


def test_a_short_corpus_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "test.txt").write_text("one two three " * 10)
    corpus = corpora.find(f"file:{tmp_path}")
    with pytest.raises(
        DataError, match="holds 31 tokens, fewer than 50 blocks of 16: give it more text, or ask for fewer"
    ):
        tokens.read(corpus, "test", tokenizer, 16, 50)
    with pytest.raises(DataError, match="fewer than one block of 64: give it more text"):
        tokens.read(corpus, "test", tokenizer, 64)


def test_without_a_tokenizer() -> None:
    with pytest.raises(DataError, match=r"put tokenizer\.json into the model folder"):
        tokens.read(corpora.find("testbed/all"), "test", None, 64)
