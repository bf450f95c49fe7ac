"""The one configuration of a pruned run, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from strategy import registry
from strategy.options import Options, check_names, flag, numbers, one_of, option, without_prefix

ALIASES = {"keep_ratio": "retain_ratio"}
"""What command lines of PriorTR call options."""


@dataclass(frozen=True, init=False)
class VTRConfig(Options):
    """What to prune, where, and how much.

    The constructor takes the fields below and the options that the strategy declares, see `options`, as keyword
    arguments, each also under its name in `ALIASES`. Options of other strategies may be given at their defaults. Values
    may be given as people type them: 192, "192", 0.334, [1, 11, 21], "[1,11,21]", "1;10;19", "False". Lists are kept as
    tuples, a single number as a tuple of one.

    Attributes:
        options: The values of the strategy's own options; each can be read as an attribute of the configuration, too.

    Raises:
        ValueError: A value is not allowed, or an option is unknown, given twice or not used by the strategy; the
            message names the field, the value and what is allowed.
    """

    enabled: bool = option(True, flag, "`False` leaves the model unpruned.")
    strategy: str = option("clse", one_of(registry.available, registry.left_out), "The pruning method.")
    keep_tokens: tuple[int, ...] | None = option(
        None,
        numbers("a whole number of tokens from 1 up, or one a stage", lambda n: n >= 1, whole=True),
        "The budget in visual tokens: one number, or one for each stage. Give this or `retain_ratio`; without either, "
        "the strategy's published default holds.",
    )
    retain_ratio: tuple[float, ...] | None = option(
        None,
        numbers("a ratio above 0 and up to 1, or one a stage", lambda n: 0 < n <= 1, whole=False),
        "The budget as a ratio of the visual tokens: one number, or one for each stage.",
    )
    budget_basis: str = option(
        "stages",
        one_of(lambda: ("stages", "mean", "flops")),
        "What a single number counts: `stages`, what the strategy's own paper means by it; `mean`, the tokens of the "
        "mean layer; `flops`, the operations of a decoder with so many tokens at every layer. With the latter two, "
        "what the stages keep is scaled by one factor.",
    )
    prune_layer: tuple[int, ...] | None = option(
        None,
        numbers("a layer from 0 up, or an increasing list of layers", lambda n: n >= 0, whole=True, increasing=True),
        "The layers to prune at, increasing; pruning at K happens right before layer K, counted from 0. The strategy's "
        "own layers if not given.",
    )
    ref_layers: tuple[int, ...] | None = option(
        None,
        numbers("one layer from 0 up", lambda n: n >= 0, whole=True, single=True),
        "The layer whose input is the reference of strategies that compare layers.",
    )
    engine: str = option(
        "auto",
        one_of(lambda: ("auto", "graph", "eager")),
        "How `generate` answers greedily: `graph`, with fused layers, caches of fixed size and CUDA graphs (on a CPU "
        "the same programs without graphs); `eager`, by the stock loop; `auto`, the first on a GPU. Where the graph "
        "engine cannot answer, the stock loop answers, with one warning for each reason.",
    )
    options: Options = field(default_factory=Options)

    def __init__(self, **given: Any) -> None:
        for alias, name in ALIASES.items():
            if alias in given:
                if name in given:
                    raise ValueError(f"{alias} and {name} are the same argument: give one of the two")
                given[name] = self.reader(name)(alias, given.pop(alias))
        general = {name: given.pop(name) for name in self.names() if name in given}
        strategy = general.get("strategy", "clse")
        if strategy in registry.available():
            given = _own_options(strategy, given)
        super().__init__(**general)
        object.__setattr__(self, "options", _options_type(self.strategy)(**given))
        self._check_together()

    def __getattr__(self, name: str) -> Any:
        # Only for what is no field; `vars`, since a copy under construction has no options yet.
        if name in (options := vars(self).get("options", Options())).names():
            return getattr(options, name)
        raise AttributeError(f"{type(self).__name__} with strategy={vars(self).get('strategy')} has no {name!r}")

    def values(self) -> dict[str, Any]:
        """Return the value of each option by its name: those of the configuration, then the strategy's own."""
        return super().values() | self.options.values()

    @property
    def weight_sources(self) -> tuple[str, ...]:
        """Return the hub ids or folders of weights that the strategy's options name."""
        return tuple(value for name in self.options.weights if (value := getattr(self.options, name)) is not None)

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
        """Take the options out of a mapping of arguments and leave the rest in it.

        Each option may stand under its own name or with `vtr_` in front, as command lines of the original projects have
        it.

        Raises:
            ValueError: An option is given under both names, and as for the constructor.
        """
        return cls(**without_prefix(arguments, (*field_names(), *ALIASES)))


def _options_type(strategy: str) -> type[Options]:
    # `attach` refuses a registered class that is no Strategy; until then it has no options.
    return getattr(registry.get(strategy), "options_type", Options)


def strategy_options() -> dict[str, tuple[str, ...]]:
    """Return the options that strategies declare, and for each option the strategies that use it."""
    users: dict[str, tuple[str, ...]] = {}
    for strategy in registry.available():
        for name in _options_type(strategy).names():
            users[name] = (*users.get(name, ()), strategy)
    return users


def describe_options() -> dict[str, tuple[Any, str]]:
    """Return the default of each option, and the sentence about it: those of `VTRConfig`, then the strategies' own."""
    described = VTRConfig.describe()
    for name, (strategy, *_) in strategy_options().items():
        described[name] = _options_type(strategy).describe()[name]
    return described


def field_names() -> tuple[str, ...]:
    """Return the names of all options: those of `VTRConfig`, then the strategies' own."""
    return (*VTRConfig.names(), *strategy_options())


def _own_options(strategy: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return those of the given options that the strategy uses.

    Raises:
        ValueError: One is unknown, or not used by the strategy and not at its default.
    """
    check_names(given, field_names())
    own, users = _options_type(strategy).names(), strategy_options()
    for name, value in given.items():
        if name not in own and not _options_type(users[name][0]).is_default(name, value):
            raise ValueError(
                f"{name}={value!r}: strategy={strategy} does not use it: leave it out, or choose "
                f"{' or '.join(users[name])}"
            )
    return {name: value for name, value in given.items() if name in own}
