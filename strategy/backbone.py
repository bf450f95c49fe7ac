"""What a model family promises the engine, and the list of families."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategy.base import Facts, Grid
from strategy.kernels.layer_facts import pair_cost, token_cost
from strategy.kernels.layer_spec import LayerSpec, llama_spec


class Span(NamedTuple):
    """The visual tokens of one image or video.

    start: Sequence index of the first token; or one index for each frame, where text stands between the frames.
    grid: (T, H, W), with H * W tokens in each frame, row by row. lead: Tokens of each frame before these, such as a
    class token. row_tail: Tokens behind each row, such as a new line. Both lie off the grid, and are pruned like the
    others. tower_call: Which call of the vision tower encodes it, where images and videos of a batch take one each.
    """

    start: int | tuple[int, ...]
    grid: Grid
    lead: int = 0
    row_tail: int = 0
    tower_call: int = 0


class EncoderSpec(NamedTuple):
    """Where a vision tower computes attention, for strategies that ask what it saw.

    layers: The tower's layers, in order. query, key: Paths of a layer's modules that project all heads' queries and
    keys; one path where one module projects queries, keys and values. heads: How many. class_token: Whether the first
    token of each picture is a class token. rotary: Name of the layer's argument with the cosines and sines that rotate
    its tokens, if they are rotated. ends: Name of the layer's argument with the bounds of the pieces, pictures or
    windows, inside which tokens see each other, where one sequence [L, C] holds them all. merge: Makes values of visual
    tokens [..., N, D] out of those of patches [..., L, D]; None where each patch is a visual token. order: The tower,
    and what gives, from the arguments of its call, the place of each visual token among those that the layers see; None
    where these stand in order.
    """

    layers: Sequence[nn.Module]
    query: str
    key: str
    heads: int
    class_token: bool = True
    rotary: str | None = None
    ends: str | None = None
    merge: Callable[[Tensor], Tensor] | None = None
    order: tuple[nn.Module, Callable[[Mapping[str, Any]], Tensor]] | None = None


class JointSpace(NamedTuple):
    """The joint space of pictures and texts that a CLIP model has.

    align: Returns the place [..., D] of the features [..., C] of a layer of the vision tower, in float32. tokenize:
    Returns the token ids [P, L] of the pieces of texts, padded on the right, with the length of each piece [P] and the
    number of the text that it is of [P]. embed: Given these, returns the place [P, D] of each piece, of length 1, in
    float32.
    """

    align: Callable[[Tensor], Tensor]
    tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor, Tensor]]
    embed: Callable[[Tensor, Tensor], Tensor]


FasterMethod = tuple[nn.Module, str, Callable[..., Any]]
"""A module, the name of its method, and a function in place of the method, which is given the module first."""

Layout = Sequence[Sequence[Span]]
"""The spans of each sample of a batch."""


class GreedyRequest(NamedTuple):
    """What `generate` asks of its greedy loop.

    prompt_length: Tokens of the prompts. num_ids: How many of these are given as token ids. processors,
    stopping_criteria: transformers' lists. eos_ids: The ids that end an answer. pad_id: The id that follows the end.
    cache: The past_key_values that were given. token_ids_only: Whether token ids are all that is wanted.
    """

    prompt_length: int
    num_ids: int
    processors: Sequence[Any]
    stopping_criteria: Any
    eos_ids: Sequence[int]
    pad_id: int | None
    cache: Any
    token_ids_only: bool

    @property
    def max_new_tokens(self) -> int | None:
        """Return how many tokens an answer may have; None if something else than that and end tokens stops it."""
        lengths = [each.max_length for each in self.stopping_criteria if hasattr(each, "max_length")]
        others = [
            each
            for each in self.stopping_criteria
            if not hasattr(each, "max_length") and not hasattr(each, "eos_token_id")
        ]
        return min(lengths) - self.num_ids if lengths and not others else None

    def one_token_criteria(self) -> Any:
        """Return criteria that stop the loop after one token."""
        only = copy.copy(next(each for each in self.stopping_criteria if hasattr(each, "max_length")))
        only.max_length = self.num_ids + 1
        return type(self.stopping_criteria)([only])


Generate = Callable[[Callable[[Any], Tensor], GreedyRequest], Tensor]
"""Answers a request, given the stock loop, which takes the criteria that stop it; returns token ids."""


class Backbone(ABC):
    """Facts about one model family; it never sees a strategy.

    Attributes:
        name: How users name the family.
        models: The classes whose instances are pruned whole.
        decoders: The bare text decoders, which need their layout given by hand.
        nominal_tokens, own_size, video: See `Facts`.
        size_methods: Methods of the vision modules whose results depend only on the sizes of pictures.
        vision_graphs: Whether the graph engine may run the vision modules as programs; if not, they run as they are.
        entry_makes_masks: Whether the entry makes the decoder's masks, so that padding is given to the entry only.
        encoder_methods: Methods of the entry that `generate` calls in front of the entry's forward call, which then is
            not given their arguments, as since transformers 5.24. `layout` is given these too.
    """

    name: str
    models: tuple[type[nn.Module], ...]
    decoders: tuple[type[nn.Module], ...]
    nominal_tokens: int
    own_size: bool = False
    video: bool = False
    size_methods: tuple[str, ...] = ()
    vision_graphs: bool = True
    encoder_methods: tuple[str, ...] = ()
    entry_makes_masks: bool = False

    def facts(self, decoder: Any) -> Facts:
        """Return what strategies may know of a decoder."""
        layers, specs, experts = decoder.layers, self.layer_specs(decoder), self.experts(decoder)
        pair = sum(map(pair_cost, layers, specs)) / sum(token_cost(layer, experts) for layer in layers)
        rows = tuple(number for number, spec in enumerate(specs) if spec.has_rows)
        attention_layers = None if len(rows) == len(layers) else rows
        return Facts(len(layers), self.nominal_tokens, self.own_size, self.video, pair, attention_layers)

    def experts(self, decoder: Any) -> int:
        """Return how many experts of a mixture a token goes through; 0 without a mixture."""
        return getattr(decoder.config, "num_experts_per_tok", 0)

    def layer_spec(self, layer: nn.Module) -> LayerSpec:
        """Describe a decoder layer; the default recognises layers with the modules of Llama.

        A family whose layers differ replaces what differs, such as `dataclasses.replace(super().layer_spec(layer),
        window=1024, attention="window")`. Whoever computes with the layer's weights reads nothing else.
        """
        return llama_spec(layer)

    def layer_specs(self, decoder: Any) -> tuple[LayerSpec, ...]:
        """Describe all layers of a decoder."""
        return tuple(self.layer_spec(layer) for layer in decoder.layers)

    @abstractmethod
    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the text decoder inside a model: the module with the `layers` that are pruned between.

        The decoder has a final `norm`, and a `config`.
        """

    @abstractmethod
    def entry(self, model: nn.Module) -> nn.Module:
        """Return the module whose forward call shows where the visual tokens lie."""

    @abstractmethod
    def layout(self, model: nn.Module, kwargs: Mapping[str, Any]) -> Layout | None:
        """Return the layout that the keyword arguments of the entry's forward call show; None for a text."""

    def visual_samples(self, model: nn.Module, kwargs: Mapping[str, Any]) -> int:
        """Return how many samples of the entry's forward call, which follows a filled cache, show visual tokens in it.

        The default, 0, is for a family that cannot tell.
        """
        return 0

    @abstractmethod
    def rotary(self, layer: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B or 1, L, head width] that rotate the tokens of a layer's forward call."""

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, L, head width] that rotate tokens at positions [B, L], or several kinds of them.

        The default is that of transformers since 4.48 for text, which has one kind of positions.
        """
        return decoder.rotary_emb(decoder.norm.weight, positions)

    def greedy_loop(self, model: Any, generate: Generate) -> dict[str, Any]:
        """Return what to set on a model, by attribute, so that `generate` replaces its greedy loop.

        The default is empty, for a family that answers with the stock loop only.
        """
        return {}

    def vision(self, model: Any) -> list[nn.Module]:
        """Return the modules that make visual tokens of pixels, none of them inside another one."""
        return []

    def pieces(self, module: nn.Module, arguments: Mapping[str, Any]) -> Sequence[int] | None:
        """Return the lengths of the pieces, in tokens, in which a call of a vision module computes attention.

        What the call costs besides has to grow as the tokens do: then the operations of one call are counted, and those
        of others follow. The default, None, has those of each shape counted, which takes time.

        Args:
            module: The module.
            arguments: Those of its forward call, by name.
        """
        return None

    def faster_methods(self, model: Any) -> Sequence[FasterMethod]:
        """Return what does the same as methods of the model's modules in less time, for the graph engine.

        Examples are the attention of a vision tower, and methods that read tensors of the GPU, for which the host would
        wait. The default is empty.
        """
        return ()

    def encoder(self, model: Any) -> EncoderSpec | None:
        """Describe the vision tower of a model.

        The default, None, means that nobody knows: strategies that ask what the tower saw are refused.
        """
        return None

    def joint_space(self, model: Any, clip_text: str) -> JointSpace | None:
        """Return the joint space of a CLIP model, which is given by a hub id or a folder, and of the vision tower.

        The default, None, means that the vision tower is none of a CLIP model, or that nobody knows.

        Raises:
            ValueError: The CLIP model cannot be loaded, or is not that of the vision tower.
        """
        return None

    def questions(self, model: Any, kwargs: Mapping[str, Any]) -> list[str] | None:
        """Return what each prompt of the entry's forward call asks, for `JointSpace.tokenize`.

        The default, None, means that nobody knows.
        """
        return None

    def num_template_tokens(self, model: Any, kwargs: Mapping[str, Any]) -> list[int] | None:
        """Return how many tokens of a template follow the question in each prompt of the entry's forward call.

        The default, None, means that nobody knows: the first token behind the visual ones then ends a prompt without
        its question.
        """
        return None

    def added_features(self, kwargs: dict[str, Any]) -> list[Tensor]:
        """Take out of `kwargs` what the decoder's loop would add to the hidden states after its first layers.

        Args:
            kwargs: The keyword arguments of the decoder's forward call.

        Returns:
            [B, S, C] for each of these layers, over the whole prompt, zero where nothing is added.
        """
        return []

    def extra_hooks(self, decoder: nn.Module) -> list[RemovableHandle]:
        """Register the hooks that this family's code needs because a pruned cache is shorter than its position ids."""
        return []


def template_length(ids: Sequence[int], end: int) -> int:
    """Return how many tokens of a template follow the question in a prompt, see `Backbone.num_template_tokens`.

    Args:
        ids: The prompt's token ids, without padding.
        end: The template's first token, which ends the question's turn; 0 is returned for a prompt without it.
    """
    return ids[::-1].index(end) + 1 if end in ids else 0


# Methods that adapters of other people may still have under their former names, where nothing would call them.
RENAMED = {
    "closing": "num_template_tokens",
    "of_sizes": "size_methods",
    "greedy": "greedy_loop",
    "angles": "rotary_at",
    "added": "added_features",
}
_backbones: dict[str, Backbone] = {}


def register_backbone(backbone: Backbone) -> None:
    """Add a family to those that `strategy.prune` recognises.

    Raises:
        ValueError: The adapter has an attribute under its former name.
    """
    if former := [name for name in RENAMED if hasattr(backbone, name)]:
        renames = ", ".join(f"{name} to {RENAMED[name]}" for name in former)
        raise ValueError(f"{type(backbone).__name__}: attributes of Backbone were renamed: rename {renames}")
    _backbones[backbone.name] = backbone


def find_backbone(model: nn.Module, name: str | None = None) -> Backbone:
    """Return the family of a model or bare decoder.

    Args:
        model: The model or decoder.
        name: The family, where the class of a decoder belongs to several.

    Raises:
        ValueError: The family is unknown, or not unique.
    """
    if name is not None and name not in _backbones:
        raise ValueError(f"backbone={name!r}: allowed are {_names(_backbones)}")
    lineage = type(model).__mro__
    found = {
        key: min(lineage.index(kind) for kind in known)
        for key, backbone in _backbones.items()
        if name in (None, key) and (known := set(lineage) & {*backbone.models, *backbone.decoders})
    }
    # Of a family built upon another one and that other one, the nearer class wins.
    found = {key: distance for key, distance in found.items() if distance == min(found.values())}
    kind = type(model).__name__
    if not found:
        wanted = (
            f"is not a model of the backbone {name!r}" if name else f"belongs to no backbone ({_names(_backbones)})"
        )
        raise ValueError(
            f"{kind} {wanted}; import the package of its backbone first, or write a strategy.Backbone for it, with "
            f"name, models, decoders, nominal_tokens, {', '.join(sorted(Backbone.__abstractmethods__))}, and pass that "
            "to strategy.register_backbone, as docs/adding_a_backbone.md shows"
        )
    if len(found) > 1:
        raise ValueError(f"{kind} belongs to several backbones: give backbone= one of {_names(found)}")
    return _backbones[next(iter(found))]


def _names(backbones: Iterable[str]) -> str:
    return ", ".join(sorted(backbones)) or "none is imported yet"
