"""Digits and capital letters of five by seven cells, drawn for the clutter world; no font is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH, HEIGHT = 5, 7  # cells of a letter
DRAWN = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "#..#. #..#. #..#. ##### ...#. ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
}


def width_of(text: str) -> int:
    """Return the cells that a text is wide, with one between letters."""
    return (WIDTH + 1) * len(text) - 1


def bitmaps(texts: Sequence[str]) -> Tensor:
    """Return texts as cells [T, 9, width + 2], 1 where there is ink; a border of one cell has none."""
    cells = torch.zeros(len(texts), HEIGHT + 2, max(map(width_of, texts)) + 2)
    for text, into in zip(texts, cells, strict=True):
        for place, letter in enumerate(text):
            left = 1 + place * (WIDTH + 1)
            drawn = [[float(cell == "#") for cell in row] for row in DRAWN[letter].split()]
            into[1:-1, left : left + WIDTH] = torch.tensor(drawn)
    return cells
