"""Options as people type them: their declaration, and the checks that turn them into values."""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

Read = Callable[[str, Any], Any]
"""Turns an option's name and the value that was given into a checked value; raises ValueError that names both."""


def option(default: Any, read: Read, help: str) -> Any:
    """Declare an option as a field of an `Options` class: its default, its check, and a sentence for the docs."""
    return field(default=default, metadata={"read": read, "help": help})


@dataclass(frozen=True, init=False)
class Options:
    """Base of classes whose fields are options, each declared with `option`.

    A subclass is a `@dataclass(frozen=True, init=False)`. Its constructor takes the fields as keyword arguments and
    raises ValueError that names the field, the value and what is allowed.
    """

    weights: ClassVar[tuple[str, ...]] = ()
    """The options that name weights beside those of the model, by hub ids or folders."""

    def __init__(self, **given: Any) -> None:
        check_names(given, self.names())
        for each in fields(self):
            if "read" in each.metadata:
                value = each.metadata["read"](each.name, given.get(each.name, each.default))
                object.__setattr__(self, each.name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the options."""
        return tuple(each.name for each in fields(cls) if "read" in each.metadata)

    def values(self) -> dict[str, Any]:
        """Return the value of each option by its name."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def reader(cls, name: str) -> Read:
        """Return the check of an option."""
        [read] = [each.metadata["read"] for each in fields(cls) if each.name == name]
        return read

    @classmethod
    def is_default(cls, name: str, value: Any) -> bool:
        """Return whether a value that may be given for an option means the option's default."""
        read, (default, _) = cls.reader(name), cls.describe()[name]
        try:
            return bool(read(name, value) == read(name, default))
        except ValueError:
            return False

    @classmethod
    def describe(cls) -> dict[str, tuple[Any, str]]:
        """Return each option's default and the sentence about it."""
        return {each.name: (each.default, each.metadata["help"]) for each in fields(cls) if "read" in each.metadata}


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not known, with the nearest one that is."""
    known = tuple(known)
    for name in given:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        if name not in known:
            raise ValueError(f"unknown argument {name!r}: {hint}allowed are {', '.join(known)}")


def flag(name: str, value: Any) -> bool:
    """Read True or False, also as text."""
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r}: allowed are True and False")


def path(name: str, value: Any) -> str | None:
    """Read a hub id or a folder, or None."""
    if value is None or str(value).strip().lower() == "none":
        return None
    if not str(value).strip():
        raise ValueError(f"{name}={value!r}: want a hub id or a folder; omit it for none")
    return str(value)


def one_of(allowed: Callable[[], tuple[str, ...]], besides: Callable[[], str] = str) -> Read:
    """Return a reader of one of some words.

    Args:
        allowed: Returns the words.
        besides: Returns what an error adds to the list of words.
    """

    def read(name: str, value: Any) -> str:
        if value not in allowed():
            raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed())}{besides()}")
        return str(value)

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _number_or_nan(value: Any) -> float:
    try:
        return _number(value)
    except (TypeError, ValueError):
        return math.nan


def numbers(
    allowed: str, test: Callable[[float], bool], whole: bool, increasing: bool = False, single: bool = False
) -> Read:
    """Return a reader of a number or a list of numbers, or None; the value is a tuple.

    Args:
        allowed: What an error says is allowed.
        test: Whether a number is allowed.
        whole: Whether the numbers are integers.
        increasing: Whether each number has to be greater than the one before.
        single: Whether only one number is allowed.
    """

    def read(name: str, value: Any) -> tuple[Any, ...] | None:
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
            return None
        items = value
        if isinstance(value, str):
            items = value.strip().strip("[]()").replace(";", ",").split(",")
        elif not isinstance(value, (list, tuple)):
            items = [value]
        try:
            found = [_number(item) for item in items]
        except (TypeError, ValueError):
            found = []
        ordered = all(a < b for a, b in itertools.pairwise(found)) if increasing else True
        fits = all(test(number) and not (whole and number % 1) for number in found)
        if not found or not fits or not ordered or (single and len(found) > 1):
            raise ValueError(f"{name}={value!r}: allowed is {allowed}")
        return tuple(int(number) if whole else number for number in found)

    return read


def between(low: float, high: float) -> Read:
    """Return a reader of one number from `low` to `high`."""

    def read(name: str, value: Any) -> float:
        number = _number_or_nan(value)
        if not low <= number <= high:
            raise ValueError(f"{name}={value!r}: allowed is a number from {low:g} to {high:g}")
        return number

    return read


def at_least(low: int) -> Read:
    """Return a reader of one whole number from `low` up."""

    def read(name: str, value: Any) -> int:
        number = _number_or_nan(value)
        if not number >= low or number % 1:
            raise ValueError(f"{name}={value!r}: allowed is a whole number from {low} up")
        return int(number)

    return read


count = at_least(1)


def positive(name: str, value: Any) -> float:
    """Read a positive number from 1e-6 to 1e6."""
    number = _number_or_nan(value)
    # Beyond these bounds float32 makes zeros and infinities of what is divided by the number.
    if not 1e-6 <= number <= 1e6:
        raise ValueError(f"{name}={value!r}: allowed is a number above 0, from 1e-6 to 1e6")
    return number


def without_prefix(arguments: dict[str, Any], names: Iterable[str], prefix: str = "vtr_") -> Mapping[str, Any]:
    """Take options out of a mapping of arguments, each under its own name or with a prefix, and leave the rest in it.

    Raises:
        ValueError: An option is given under both names.
    """
    taken: dict[str, Any] = {}
    for name in names:
        given = [key for key in (name, f"{prefix}{name}") if key in arguments]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are the same argument: give one of the two")
        taken.update((name, arguments.pop(key)) for key in given)
    return taken
