"""Special tokens that somebody typed into a question."""

import re
from collections.abc import Iterable


def as_text(text: str, tokens: Iterable[str]) -> str:
    """Return a text in which special tokens are spelled so that a tokeniser reads them as text.

    A space behind a token's first character does that: `<|image_pad|>` becomes `< |image_pad|>`.
    """
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", text) if pattern else text
