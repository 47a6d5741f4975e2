from __future__ import annotations

from pathlib import Path

import pytest

from mariotte.errors import StudyError
from mariotte.experiments.study import embedded, parse, read

GOOD = """
format = 1
name = "small"
models = ["testbed/qwen2-113k"]
measures = ["loss:testbed/all(rows=4)"]
chains = [{ chain = "{method}@{amount}", method = ["slice", "ffn"], amount = [0.1, 0.5] }, "magnitude@0.5 | lora@4k"]
[calibration]
corpus = "testbed/all"
"""


def test_patterns_become_chains() -> None:
    assert [str(chain) for chain in parse(GOOD).expanded()] == [
        "slice@0.1",
        "slice@0.5",
        "ffn@0.1",
        "ffn@0.5",
        "magnitude@0.5 | lora@4k",
    ]


def test_a_chain_asked_for_twice_is_one() -> None:
    text = GOOD.replace('"magnitude@0.5 | lora@4k"', '"slice@.10"')
    assert len(parse(text).expanded()) == 4


def test_a_measure_may_be_for_some_models() -> None:
    text = """
format = 1
name = "two"
models = ["a", "b"]
chains = ["magnitude@0.5"]
measures = [
  "tasks:testbed",
  { measure = "loss:testbed/all", models = ["a"] },
  { measure = "loss:testbed/sentences", models = ["b"] },
]
"""
    study = parse(text)
    assert [entry.measure for entry in study.measured("a")] == ["tasks:testbed", "loss:testbed/all"]
    assert [entry.measure for entry in study.measured("b")] == ["tasks:testbed", "loss:testbed/sentences"]
    assert len(study.measured()) == 3


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "must be TOML, and cannot be read"),
        (replaced("measures =", "measure ="), "no key named 'measure'; did you mean 'measures'"),
        (replaced("corpus =", "corpora ="), "no key named 'calibration.corpora'; did you mean 'calibration.corpus'"),
        (replaced("format = 1", "format = 9"), "has format 9, and this Mariotte reads up to 1"),
        (replaced("format = 1", ""), "format: field required"),
        (replaced('models = ["testbed/qwen2-113k"]', "models = []"), "models: list should have at least 1 item"),
        (replaced('name = "small"', 'name = "a b"'), "name: string should match pattern"),
        (replaced('name = "small"', "name = 3"), "name: input should be a valid string, got 3"),
        (replaced("{method}@", "{methods}@"), "unknown key 'method'"),
        (replaced("amount = [0.1, 0.5]", "other = 1"), "unknown key 'other'"),
        (replaced(", amount = [0.1, 0.5]", ""), "asks for a list called 'amount'"),
        (replaced("[0.1, 0.5]", "0.1"), "'amount' must be a list"),
        (
            replaced('"loss:testbed/all(rows=4)"', '{ measure = "tasks:testbed", models = ["testbed/qwen2-133k"] }'),
            "no model of this study named 'testbed/qwen2-133k'; did you mean 'testbed/qwen2-113k'",
        ),
        (
            replaced('["testbed/qwen2-113k"]', '["a", "b"]').replace(
                '"loss:testbed/all(rows=4)"', '{ measure = "tasks:testbed", models = ["a"] }'
            ),
            "nothing is measured of 'b'",
        ),
        (replaced("slice", "sl(ice"), "study 'small': chain 'sl(ice@0.1': expected '=' and a value"),
    ],
)
def test_what_is_no_study_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(StudyError) as caught:
        parse(text, "s.toml").expanded()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"the study .*no\.toml cannot be read: No such file"):
        read(tmp_path / "no.toml")


def test_the_quickstart_comes_with_the_package() -> None:
    study = read(embedded("quickstart"))
    assert len(study.models) == 3
    assert len(study.expanded()) == 3 * 9 + 3 * 2


def test_every_study_of_the_project_reads() -> None:
    for path in Path(embedded("quickstart")).parent.rglob("*.toml"):
        assert read(path).expanded()
