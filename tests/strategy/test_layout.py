"""Which tokens of a span lie on its grid."""

import pytest
import torch

from strategy import Span
from strategy.pruning.layout import SpanKind, on_grid, resolve_layout


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        (SpanKind((1, 2, 3)), 6, [0, 1, 2, 3, 4, 5]),
        (SpanKind((2, 1, 2), lead=1), 6, [1, 2, 4, 5]),
        (SpanKind((1, 2, 3), row_tail=1), 8, [0, 1, 2, 4, 5, 6]),
        (SpanKind((2, 2, 1), lead=1, row_tail=2), 14, [1, 4, 8, 11]),
    ],
)
def test_what_stands_before_a_frame_and_behind_a_row_lies_off_the_grid(kind, size, expected):
    assert kind.grid[0] * kind.frame_size == size
    assert kind.on_grid().tolist() == expected
    second = on_grid([SpanKind((1, 1, 2)), kind], torch.device("cpu"))[1]
    assert second.tolist() == [2 + at for at in expected]


def test_frames_of_rows_with_tails_follow_each_other():
    [[span]] = resolve_layout([[Span(5, (3, 2, 3), 1, 1)]], 1, 40)
    assert span.starts == (5, 14, 23)
    with pytest.raises(ValueError, match="the visual tokens end at 32 of 32 tokens"):
        resolve_layout([[Span(5, (3, 2, 3), 1, 1)]], 1, 32)


def test_a_negative_tail_is_refused():
    with pytest.raises(ValueError, match="sample 0: row_tail=-1, want the number of tokens behind each row"):
        resolve_layout([[(5, (1, 2, 2), 0, -1)]], 1, 20)
