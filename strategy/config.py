"""The one configuration of a pruned run, checked where it is made."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from strategy.registry import available, left_out


@dataclass(frozen=True, init=False)
class VTRConfig:
    """What to prune, where, and how much.

    enabled: False leaves the model unpruned. strategy: one of `strategy.available()`.
    keep_tokens or retain_ratio, not both: the budget, one number or one a stage; the strategy's
    published default if neither is given. budget_basis: what a single number counts: `stages`, what the
    strategy's own paper means by it; `mean`, the tokens of the mean layer; `flops`, the operations of a decoder
    with so many tokens at every layer. With the latter two, what the stages keep is scaled, all by one factor.
    prune_layer: the layers to prune at, increasing; the strategy's own if not given. ref_layers: the layer
    whose input is the reference. clse_cutoff_ratio, clse_temp, clse_fft_3d: see `strategy.clse.score`.
    query_aggregation, head_aggregation: see `strategy.priortr`. engine: how `generate` answers greedily: `graph`, with
    fused layers, caches of fixed size and CUDA graphs (on a CPU, the same programs as they are); `eager`, by the stock
    loop; `auto`, the first on a GPU. What the first cannot do falls to the second, which is said once.

    Values may be given as people type them: 192, "192", 0.334, [1, 11, 21], "[1,11,21]", "1;10;19",
    "False". Lists are kept as tuples, a single number as a tuple of one. Raises ValueError that names
    the field, the value and what is allowed.
    """

    enabled: bool
    strategy: str
    keep_tokens: tuple[int, ...] | None
    retain_ratio: tuple[float, ...] | None
    budget_basis: str
    prune_layer: tuple[int, ...] | None
    ref_layers: tuple[int, ...] | None
    clse_cutoff_ratio: float
    clse_temp: float
    clse_fft_3d: bool
    query_aggregation: str
    head_aggregation: str
    engine: str

    def __init__(
        self,
        enabled: Any = True,
        strategy: Any = "clse",
        keep_tokens: Any = None,
        retain_ratio: Any = None,
        budget_basis: Any = "stages",
        prune_layer: Any = None,
        ref_layers: Any = None,
        clse_cutoff_ratio: Any = 0.1,
        clse_temp: Any = 0.1,
        clse_fft_3d: Any = False,
        query_aggregation: Any = "question",
        head_aggregation: Any = "mean",
        engine: Any = "auto",
        **unknown: Any,
    ) -> None:
        check_names(unknown, field_names())
        given = locals()
        for name, read in _READERS.items():
            object.__setattr__(self, name, read(name, given[name]))
        self._check_together()

    def _check_together(self) -> None:
        if self.keep_tokens and self.retain_ratio:
            raise ValueError(
                f"keep_tokens={self.keep_tokens} and retain_ratio={self.retain_ratio}: give one of the two"
            )
        layers = self.prune_layer
        for name in ("keep_tokens", "retain_ratio"):
            budget = getattr(self, name)
            if budget and layers and len(budget) not in (1, len(layers)):
                raise ValueError(
                    f"{name}={list(budget)}: want one number or one for each of the {len(layers)} stages "
                    f"of prune_layer={list(layers)}"
                )

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> VTRConfig:
        """Take the knobs out of a mapping of arguments and leave the rest in it.

        Each field may stand under its own name or with `vtr_` in front, as command lines of the original
        projects have it. ValueError for a field given under both, and as for the constructor.
        """
        values: dict[str, Any] = {}
        for name in field_names():
            given = [key for key in (name, f"vtr_{name}") if key in arguments]
            if len(given) > 1:
                raise ValueError(f"{given[0]} and {given[1]} are the same argument: give one of the two")
            values.update((name, arguments.pop(key)) for key in given)
        return cls(**values)


def field_names() -> tuple[str, ...]:
    """The names of the configuration's fields."""
    return tuple(field.name for field in fields(VTRConfig))


def check_names(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ValueError for a name that is not known, with the nearest one that is."""
    for name in given:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        if name not in known:
            raise ValueError(f"unknown argument {name!r}: {hint}allowed are {', '.join(known)}")


def _flag(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r}: allowed are True and False")


def _one_of(allowed: Callable[[], tuple[str, ...]], besides: Callable[[], str] = str) -> Callable[[str, Any], str]:
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


def _numbers(
    allowed: str, test: Callable[[float], bool], whole: bool, increasing: bool = False, single: bool = False
) -> Callable[[str, Any], tuple[Any, ...] | None]:
    def read(name: str, value: Any) -> tuple[Any, ...] | None:
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
            return None
        items = value
        if isinstance(value, str):
            items = value.strip().strip("[]()").replace(";", ",").split(",")
        elif not isinstance(value, (list, tuple)):
            items = [value]
        try:
            numbers = [_number(item) for item in items]
        except (TypeError, ValueError):
            numbers = []
        ordered = all(a < b for a, b in itertools.pairwise(numbers)) if increasing else True
        fits = all(test(number) and not (whole and number % 1) for number in numbers)
        if not numbers or not fits or not ordered or (single and len(numbers) > 1):
            raise ValueError(f"{name}={value!r}: allowed is {allowed}")
        return tuple(int(number) if whole else number for number in numbers)

    return read


def _positive(name: str, value: Any) -> float:
    try:
        number = _number(value)
    except (TypeError, ValueError):
        number = 0.0
    # Beyond this, float32 makes zeros and infinities of what is divided by it.
    if not 1e-6 <= number <= 1e6:
        raise ValueError(f"{name}={value!r}: allowed is a number above 0, from 1e-6 to 1e6")
    return number


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "enabled": _flag,
    "strategy": _one_of(available, left_out),
    "keep_tokens": _numbers("a whole number of tokens from 1 up, or one a stage", lambda n: n >= 1, whole=True),
    "retain_ratio": _numbers("a ratio above 0 and up to 1, or one a stage", lambda n: 0 < n <= 1, whole=False),
    "budget_basis": _one_of(lambda: ("stages", "mean", "flops")),
    "prune_layer": _numbers(
        "a layer from 0 up, or an increasing list of layers", lambda n: n >= 0, whole=True, increasing=True
    ),
    "ref_layers": _numbers("one layer from 0 up", lambda n: n >= 0, whole=True, single=True),
    "clse_cutoff_ratio": _positive,
    "clse_temp": _positive,
    "clse_fft_3d": _flag,
    "query_aggregation": _one_of(lambda: ("question", "last")),
    "head_aggregation": _one_of(lambda: ("mean", "max")),
    "engine": _one_of(lambda: ("auto", "graph", "eager")),
}
