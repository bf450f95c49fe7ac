"""The checks of options: what each gives, and what each says of a wrong value."""

import re
from pathlib import Path

import pytest

from strategy import options
from strategy.options import between

GUIDE = Path(__file__).parents[2] / "docs/adding_a_strategy.md"


@pytest.mark.parametrize(("value", "number"), [(0, 0.0), ("1", 1.0), (" 0.25 ", 0.25), (1.0, 1.0)])
def test_a_number_between_bounds_is_a_float(value, number):
    found = between(0, 1)("gamma", value)
    assert (found, type(found)) == (number, float)


@pytest.mark.parametrize("value", [-1e-9, 1.001, "nan", "inf", "much", None, True, [1], ""])
def test_a_number_beyond_its_bounds_is_named_with_them(value):
    with pytest.raises(ValueError, match=rf"^gamma={re.escape(repr(value))}: allowed is a number from 0 to 1$"):
        between(0, 1)("gamma", value)


def test_the_guide_names_every_check():
    """A check is a public function that reads an option, or that returns one that does."""
    others = {"option", "check_names", "without_prefix"}
    checks = {name for name, found in vars(options).items() if getattr(found, "__module__", "") == options.__name__}
    checks = {name for name in checks if not name.startswith("_") and name.islower()} - others
    table = GUIDE.read_text().partition("| check | gives |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == checks
