"""What a model family must tell the engine, and the list of families."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategy.base import Facts, Grid
from strategy.counts import pair_cost, token_cost


class Span(NamedTuple):
    """The visual tokens of one image or video.

    start: sequence index of the first one; or one index a frame, where text stands between the frames.
    grid: (T, H, W), with H * W tokens next to each other in each frame. lead: tokens of each frame before
    these, such as a class token, which lie off the grid.
    """

    start: int | tuple[int, ...]
    grid: Grid
    lead: int = 0


Layout = Sequence[Sequence[Span]]
"""The spans of each sample of a batch."""


class Asked(NamedTuple):
    """What `generate` asks of its greedy loop.

    prompt: how long the prompts are, and ids: how many of that as token ids. processors, criteria: transformers' lists.
    ends, pad: the ids that end an answer, and the one that follows. cache: what past_key_values were given. plain:
    whether token ids are all that is wanted.
    """

    prompt: int
    ids: int
    processors: Sequence[Any]
    criteria: Any
    ends: Sequence[int]
    pad: int | None
    cache: Any
    plain: bool

    @property
    def limit(self) -> int | None:
        """How many tokens an answer may have; None if something else than that and end tokens stops it."""
        lengths = [each.max_length for each in self.criteria if hasattr(each, "max_length")]
        others = [
            each for each in self.criteria if not hasattr(each, "max_length") and not hasattr(each, "eos_token_id")
        ]
        return min(lengths) - self.ids if lengths and not others else None

    def one_token(self) -> Any:
        """Criteria that stop the loop after one token."""
        only = copy.copy(next(each for each in self.criteria if hasattr(each, "max_length")))
        only.max_length = self.ids + 1
        return type(self.criteria)([only])


class Backbone(ABC):
    """Facts about one model family; it never sees a strategy.

    models: the classes whose instances are pruned whole. decoders: the bare text decoders, which need
    their layout given by hand. nominal_tokens, own_size, video: see `Facts`. of_sizes: methods of the vision
    modules whose results depend on the sizes of pictures only.
    """

    name: str
    models: tuple[type[nn.Module], ...]
    decoders: tuple[type[nn.Module], ...]
    nominal_tokens: int
    own_size: bool = False
    video: bool = False
    of_sizes: tuple[str, ...] = ()

    def facts(self, decoder: Any) -> Facts:
        """What strategies may know of a decoder."""
        layer, experts = decoder.layers[0], self.experts(decoder)
        pair = pair_cost(layer) / token_cost(layer, experts)
        return Facts(len(decoder.layers), self.nominal_tokens, self.own_size, self.video, pair)

    def experts(self, decoder: Any) -> int:
        """How many experts of a mixture a token goes through; 0 without a mixture."""
        return getattr(decoder.config, "num_experts_per_tok", 0)

    @abstractmethod
    def decoder(self, model: nn.Module) -> nn.Module:
        """The text decoder inside a model: the module whose `layers` are pruned between."""

    @abstractmethod
    def entry(self, model: nn.Module) -> nn.Module:
        """The module whose forward call says where the visual tokens lie."""

    @abstractmethod
    def layout(self, model: nn.Module, call: Mapping[str, Any]) -> Layout | None:
        """The layout that the keyword arguments of the entry's forward call tell; None for a text."""

    @abstractmethod
    def rotary(self, layer: nn.Module, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, L, head width] that rotate the tokens of a layer's forward call."""

    def angles(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, head width] that rotate tokens at positions [B, L], or several kinds of them.

        As transformers has it since 4.48 for text that has one kind.
        """
        return decoder.rotary_emb(decoder.norm.weight, positions)

    def greedy(self, model: Any, answer: Callable[[Callable[[Any], Tensor], Asked], Tensor]) -> dict[str, Any]:
        """What to set on a model, by attribute, so that `answer` stands in the place of its greedy loop.

        answer: given the stock loop, which takes the criteria that stop it, and what is asked of it. Empty, as here,
        for a family that answers with the stock loop only.
        """
        return {}

    def vision(self, model: Any) -> list[nn.Module]:
        """The modules that make visual tokens of pixels, none of them inside another one."""
        return []

    def closing(self, model: Any, call: Mapping[str, Any]) -> list[int] | None:
        """How many tokens of a template follow the question in each prompt of the entry's forward call.

        None, as here, if that cannot be told: then the first token behind the visual ones ends a prompt without
        its question.
        """
        return None

    def added(self, call: dict[str, Any]) -> list[Tensor]:
        """What the decoder's loop would add to the hidden states after its first layers, taken out of `call`.

        call: the keyword arguments of the decoder's forward call. Returns [B, S, C] a layer, over the whole
        prompt, zero where nothing is added.
        """
        return []

    def extra_hooks(self, decoder: nn.Module) -> list[RemovableHandle]:
        """Hooks that this family's code needs to bear a cache shorter than its positions."""
        return []


_backbones: dict[str, Backbone] = {}


def register_backbone(backbone: Backbone) -> None:
    """Make a family known to `strategy.prune`."""
    _backbones[backbone.name] = backbone


def find_backbone(model: nn.Module, name: str | None) -> Backbone:
    """The family of a model or bare decoder; ValueError if it is unknown or not the only one."""
    if name is not None and name not in _backbones:
        raise ValueError(f"backbone={name!r}: allowed are {_names(_backbones)}")
    lineage = type(model).__mro__
    found = {
        key: min(lineage.index(kind) for kind in known)
        for key, backbone in _backbones.items()
        if name in (None, key) and (known := set(lineage) & {*backbone.models, *backbone.decoders})
    }
    # A family built upon another one is the nearer of the two.
    found = {key: distance for key, distance in found.items() if distance == min(found.values())}
    kind = type(model).__name__
    if not found:
        wanted = (
            f"is not a model of the backbone {name!r}" if name else f"belongs to no backbone ({_names(_backbones)})"
        )
        raise ValueError(
            f"{kind} {wanted}; import the package of its backbone first, or write a strategy.Backbone "
            "for it and pass that to strategy.register_backbone"
        )
    if len(found) > 1:
        raise ValueError(f"{kind} belongs to several backbones: give backbone= one of {_names(found)}")
    return _backbones[next(iter(found))]


def _names(backbones: Iterable[str]) -> str:
    return ", ".join(sorted(backbones)) or "none is imported yet"
