"""The comparison of a predicted answer with the right one by their words alone."""

import re
import unicodedata

ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}
YES_NO = ("yes", "no")
GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
LOOSE_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
# Letters, marks and numbers; a character of any other Unicode category ends a word.
WORD_CATEGORIES = "LMN"


def normalise(text: str) -> str:
    """Return the words of a text in the form in which they are compared, with one space between them.

    The form is lower case, NFKC, without punctuation or articles, and with digits for zero to ten. A number stays one
    word: "1,000" is "1000" and "3.5" is "3.5". Only a text that consists of articles keeps them.
    """
    # NFKC comes twice, since it turns some characters into capitals, and lower() turns some into compatibility forms.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = GROUPED.sub(lambda number: number[0].replace(",", ""), text)
    text = LOOSE_POINT.sub(" ", text)
    words = "".join(c if c == "." or unicodedata.category(c)[0] in WORD_CATEGORIES else " " for c in text).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ARTICLES) or " ".join(words)


def matches(pred: str, answer: str) -> bool:
    """Return whether the normalised prediction contains the normalised answer as whole words.

    Where the answer is "yes" or "no", the prediction's first "yes" or "no" decides. An answer without any word matches
    nothing.
    """
    pred, answer = normalise(pred), normalise(answer)
    if answer in YES_NO:
        return next((word for word in pred.split() if word in YES_NO), None) == answer
    return bool(answer) and f" {answer} " in f" {pred} "
