"""A tokeniser without a checkpoint: each token id has a made-up word, such as w17."""

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(size: int, marks: Mapping[str, int], kind: Any = PreTrainedTokenizerFast) -> Any:
    """Return a fast tokeniser that splits texts at spaces; to tokenise or decode an answer takes it microseconds.

    Args:
        size: How many token ids there are.
        marks: Special tokens, which need no spaces around them, with their ids.
        kind: The class of the tokeniser, since some processors take their own family's only.
    """
    ids = {f"w{number}": number for number in range(size) if number not in marks.values()}
    words = Tokenizer(models.WordLevel(ids | dict(marks)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # All are named, so that no further tokens are added.
    named = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "w0")
    return kind(tokenizer_object=words, additional_special_tokens=[*marks], **named)


def spelled(ids: Iterable[int], marks: Mapping[int, str]) -> str:
    """Return token ids as a text of `word_tokenizer`, those of marks as the given texts."""
    return " ".join(marks.get(number, f"w{number}") for number in ids)
