"""Special tokens in a question: they lose their meaning and stay legible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategy.evaluation.special_tokens import as_text

TOKENS = ("<s>", "</s>", "<image>", "<|image_pad|>", "<|im_end|>", "<|im")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is <|image_pad|>?", "What is < |image_pad|>?"),
        ("<s></s>", "< s>< /s>"),
        ("<|im_end|>", "< |im_end|>"),
        ("<image><image>", "< image>< image>"),
        ("a < b, <em>", "a < b, <em>"),
        ("", ""),
    ],
)
def test_a_token_is_spelled_with_a_space(text, expected):
    assert as_text(text, TOKENS) == expected


@given(st.lists(st.sampled_from([*TOKENS, "<", ">", "|", "image", "s", " ", "ima<image>ge"])).map("".join))
def test_no_token_is_left_and_nothing_but_spaces_is_added(text):
    result = as_text(text, TOKENS)
    assert not any(token in result for token in TOKENS)
    assert result.replace(" ", "") == text.replace(" ", "")


def test_without_tokens_a_text_stays():
    assert as_text("<s>", []) == as_text("<s>", [""]) == "<s>"
