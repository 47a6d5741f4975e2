"""Masks by row and by pattern."""

from __future__ import annotations

import pytest
import torch

from mariotte.compress.sparsity import Pattern, readers, smallest_of_groups, smallest_of_rows, whole
from mariotte.errors import ChainError
from mariotte.testing.tiny import tiny


def test_smallest_of_rows_by_hand_and_of_equal_ones_the_first():
    score = torch.tensor([[3.0, 1.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert smallest_of_rows(score, torch.tensor([1, 1])).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    assert smallest_of_rows(score, torch.tensor([3, 3])).tolist() == [
        [False, True, True, True],
        [True, True, True, False],
    ]
    assert smallest_of_rows(score, torch.tensor([0, 4])).sum(1).tolist() == [0, 4]
    assert not smallest_of_rows(score, torch.tensor([0, 0])).any()


def test_smallest_of_groups_by_hand():
    score = torch.tensor([[4.0, 1.0, 2.0, 3.0, 9.0, 9.0, 8.0, 9.0]])
    expected = [[False, True, True, False, True, False, True, False]]
    assert smallest_of_groups(score, Pattern(2, 4)).tolist() == expected
    assert smallest_of_groups(score, Pattern(1, 4)).sum() == 2


def test_a_share_is_rounded_down_but_not_by_an_error_of_floats():
    assert whole(100, 0.29) == 29
    assert whole(33, 0.5) == 16
    assert whole(8, 1 - 1e-15) == 7


@pytest.mark.parametrize("text", ["2", "4:2", "0:4", "4:4", "2:4:8", "a:b", "-1:4", ""])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ChainError, match="test: nm must be N:M with 0 < N < M, such as 2:4, got"):
        Pattern.parse("test", text)


def test_readers_name_each_matrix_in_scope_once():
    (block, _) = tiny("llama").blocks
    found = [matrix for some in readers(block, "all").values() for matrix in some]
    assert {id(m) for m in found} == {id(m) for m in (*block.attention, *block.ffn)}
    assert len(found) == 7
    assert list(readers(block, "ffn")) == ["mlp", "down"]
    assert list(readers(block, "attention")) == ["attention", "output"]
