from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from mariotte.data import corpora
from mariotte.data.corpora import SPLITS
from mariotte.errors import DataError, UnknownNameError


def documents(name: str) -> dict[str, list[str]]:
    corpus = corpora.find(name)
    return {split: list(corpus.documents(split)) for split in SPLITS}


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(f"Story number {i} is short." for i in range(500)), encoding="utf-8")
    return path


def test_the_splits_of_a_file_share_no_document_and_lose_none(stories: Path) -> None:
    found = documents(f"file:{stories}")
    everything = [d for split in found.values() for d in split]
    assert len(everything) == len(set(everything)) == 500
    assert 330 < len(found["train"]) < 400
    assert all(len(found[split]) > 20 for split in ("calibration", "valid", "test"))


def test_equal_documents_share_a_split(tmp_path: Path) -> None:
    path = tmp_path / "twice.txt"
    path.write_text("\n\n".join(f"paragraph {i % 50}" for i in range(200)))
    found = documents(f"file:{path}")
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not set(found[a]) & set(found[b])


def test_a_folder_keeps_its_splits_and_gives_a_tenth_of_train_to_calibration(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i}" for i in range(200)))
    found = documents(f"file:{tmp_path}")
    assert {d.split()[0] for d in found["test"]} == {"test"}
    assert len(found["train"]) + len(found["calibration"]) == 200
    assert 8 < len(found["calibration"]) < 40


def test_a_fingerprint_changes_with_the_text_and_with_how_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    train = folder / "train.txt"
    train.write_text("one\n\ntwo")
    monkeypatch.setenv("MARIOTTE_DATA", str(tmp_path))
    readers = [corpora.find(name) for name in (f"file:{folder}", f"file:{train}", "wikitext2")]
    before = {corpus.fingerprint("train") for corpus in readers}
    assert len(before) == 3  # paragraphs, four fifths of the paragraphs, articles
    assert {corpus.fingerprint("train") for corpus in readers} == before
    assert readers[0].fingerprint("calibration") not in before
    train.write_text("one\n\nten!")
    assert not before & {corpus.fingerprint("train") for corpus in readers}


def test_jsonl_rows_become_text(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi.", "input": "", "output": "Hello."},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = corpora.find(f"file:{tmp_path}").documents("test")
    assert first == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"
    assert "Input" not in second


def test_wikitext_falls_into_articles() -> None:
    text = " \n = One = \n\n text \n = = Part = = \n more\n = Two = \n\n end\n"
    assert [part.split()[1] for part in corpora.articles(text)] == ["One", "Two"]


def test_mariotte_data_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text(" = Here = \n\n words\n")
    monkeypatch.setenv("MARIOTTE_DATA", str(tmp_path))
    assert list(corpora.find("wikitext2").documents("test")) == [" = Here = \n\n words"]


def test_real_corpora(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARIOTTE_DATA", str(shared / "data"))
    assert len(list(corpora.find("wikitext2").documents("test"))) == 62  # articles as counted by their headings
    found = documents("alpaca")
    assert len(found["train"]) + len(found["calibration"]) == 3982
    assert (len(found["valid"]), len(found["test"])) == (501, 517)


def test_the_testbed_speaks_in_registers() -> None:
    first = {name: next(iter(corpora.find(f"testbed/{name}").documents("calibration"))) for name in ("all", "news")}
    assert first["all"] != first["news"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "{", "line 1 must be a JSON object"),
        ("a.jsonl", "[1]", "line 1 must be a JSON object, got list"),
        ("a.jsonl", '{"question": 1}', "a row must have 'text', or 'instruction' and 'output'"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        documents(f"file:{tmp_path / name}")
    assert said in str(caught.value)


def test_no_such_file() -> None:
    with pytest.raises(DataError, match=r"no file or folder at nowhere\.txt"):
        corpora.find("file:nowhere.txt")


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        documents(f"file:{tmp_path / 'a.txt'}")


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no test split: expected test\.txt or test\.jsonl"):
        list(corpora.find(f"file:{tmp_path}").documents("test"))


def test_an_unknown_corpus() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no corpus named 'wikitext'; did you mean 'wikitext2'\?.*or give file:PATH"
    ):
        corpora.find("wikitext")


def test_a_hub_corpus_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARIOTTE_DATA", raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="is not in MARIOTTE_DATA and the hub did not give"):
        list(corpora.find("wikitext2").documents("test"))


def test_sentences_of_the_testbed_stand_alone_and_splits_share_none() -> None:
    from mariotte.testbed.world import World

    found = {split: list(islice(corpora.find("testbed/sentences").documents(split), 300)) for split in SPLITS}
    held = [set(corpora.find("testbed/sentences").documents(split)) for split in ("calibration", "valid", "test")]
    drawn = {row.text for row in World().sentences("all", "test", corpora.TESTBED_ROWS["test"])}
    assert held[2] == drawn
    for number, one in enumerate(held):
        assert all(text.endswith(".") and text.count(" .") == 1 for text in one)
        assert not one & set(found["train"])
        assert all(not one & other for other in held[number + 1 :])
