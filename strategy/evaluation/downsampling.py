"""Smaller pictures in place of pruning: the grid of visual tokens that a picture is resized to."""

import itertools
import math


def nearest_grid(tokens: float, aspect: float) -> tuple[int, int]:
    """Return the rows and columns, at least one of each, whose product is nearest to a number of tokens.

    Each side is rounded down or up from that with the exact aspect, so that pictures keep their shape; of equally near
    grids that with the nearest aspect is taken.

    Args:
        tokens: How many there should be.
        aspect: Height by width of the picture.
    """
    height, width = math.sqrt(tokens * aspect), math.sqrt(tokens / aspect)
    rows, columns = ([max(1, math.floor(side)), math.ceil(side)] for side in (height, width))
    return min(
        itertools.product(rows, columns),
        key=lambda grid: (abs(grid[0] * grid[1] - tokens), abs(math.log(grid[0] / grid[1] / aspect))),
    )


def nearest_side(tokens: int) -> int:
    """Return the side of the square grid whose number of tokens is nearest, at least 1."""
    side = max(1, math.isqrt(tokens))
    return min((side, side + 1), key=lambda each: abs(each**2 - tokens))
