from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mariotte.chain import Chain, Link, parse, parse_link, parse_number, print_number
from mariotte.errors import ChainError

names = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,4}){0,2}", fullmatch=True)
keys = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
values = numbers | st.booleans() | st.text(max_size=12)
scopes = st.from_regex(r"[a-z]{1,8}", fullmatch=True) | st.text(min_size=1, max_size=9).filter(str.strip)
links = st.builds(
    Link, names, st.none() | numbers | st.just("auto"), st.none() | scopes, st.dictionaries(keys, values, max_size=4)
)


@given(st.lists(links, min_size=1, max_size=4).map(lambda found: Chain(tuple(found))))
def test_every_chain_is_read_back_from_its_canonical_text(chain: Chain) -> None:
    if str(chain) != "dense":
        assert parse(str(chain)) == chain
        assert str(parse(str(chain))) == str(chain)


@given(numbers)
def test_every_number_is_read_back_from_its_canonical_text(value: float) -> None:
    assert parse_number(print_number(value)) == value


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("slice@0.3 | lora@1M | int8", "slice@0.3 | lora@1M | int8"),
        ("slice@.30|lora@1000k", "slice@0.3 | lora@1M"),
        ("ffn@0.20(compensate=true,  criterion = obs)", "ffn@0.2(compensate=true, criterion=obs)"),
        ("magnitude@0.5:attention", "magnitude@0.5:attention"),
        ("rtn@4.0", "rtn@4"),
        ("lora@1.5M", "lora@1500k"),
        ("shortgpt@2:layers=3-8", "shortgpt@2:layers=3-8"),
        ('lora@4k(corpus="file:a b.txt")', 'lora@4k(corpus="file:a b.txt")'),
        ('loss:"file:a b.txt"(block=64)', 'loss:"file:a b.txt"(block=64)'),
        (" dense ", "dense"),
    ],
)
def test_canonical_text(written: str, canonical: str) -> None:
    assert str(parse(written)) == canonical


def test_field_order_has_no_meaning() -> None:
    assert parse_link("ffn@0.1(b=1, a=2)") == parse_link("ffn@0.1(a=2, b=1)")
    assert hash(parse_link("ffn@0.1(b=1, a=2)")) == hash(parse_link("ffn@0.1(a=2, b=1)"))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("slice@0.3 |", "expected the name of a step"),
        ("| slice@0.3", "expected the name of a step"),
        ("", "expected the name of a step"),
        ("Slice@0.3", "expected the name of a step"),
        ("slice@abc", "an amount must be a number such as 0.3, 4 or 1M, got 'abc'"),
        ("slice@1e999", "an amount must be finite"),
        ("slice@", "expected an amount"),
        ('slice:" "', "a scope is a word"),
        ("slice@0.3 ffn@0.2", "expected '|' or the end of the chain"),
        ("ffn@0.3(criterion)", "expected '=' and a value for 'criterion'"),
        ("ffn@0.3(criterion=obs", "expected ',' or ')'"),
        ("ffn@0.3(a=1, a=2)", "field 'a' is given twice"),
        ('ffn@0.3(a="x)', "expected a closing quote"),
        ('ffn@0.3(a="\\q")', "must be a JSON string"),
    ],
)
def test_what_is_no_chain_is_refused_in_one_sentence(written: str, said: str) -> None:
    with pytest.raises(ChainError) as caught:
        parse(written)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_link_is_not_two() -> None:
    with pytest.raises(ChainError, match="expected the end of the text"):
        parse_link("loss:wikitext2 | loss:ptb")
