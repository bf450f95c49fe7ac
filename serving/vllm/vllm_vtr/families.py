"""The model families that the plug-in prunes: one row each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import ModelRegistry

from strategy.backbone import Span

PREFIX = "Pruned"


def end_of_answer(model_config: Any) -> int | None:
    """Return the token that ends answers, the first of several, which on the Qwens ends questions too."""
    ends = model_config.try_get_generation_config().get("eos_token_id")
    return ends[0] if isinstance(ends, list) else ends


@dataclass(frozen=True)
class Tower:
    """Where the vision tower of a family computes attention, for strategies that ask what it saw.

    Attributes:
        layers: The path of its layers in the model.
        projection: The path, in a layer, of the module that projects queries, keys and values, in this order.
        depth: Returns how many layers it has, of which vLLM may leave out the last, given the model's configuration.
        class_token: Whether the first token of each picture is a class token.
        merged: Returns how many neighbouring patches a visual token is made of, given the configuration.
    """

    layers: str
    projection: str
    depth: Callable[[Any], int]
    class_token: bool
    merged: Callable[[Any], int]


@dataclass(frozen=True)
class Family:
    """What the plug-in has to know of a family.

    Attributes:
        module: Where the stock class is, in vLLM's models, and the pruned one, in those of this package.
        own_size: See `strategy.Facts`.
        span: Returns the span of a picture or video, given the model's configuration and vLLM's feature of it.
        tower: Its vision tower.
        end_of_turn: Returns the token that ends the question's turn, given vLLM's configuration of the model; None if
            nothing in a prompt shows where the question ends. See `Backbone.num_template_tokens`.
    """

    module: str
    own_size: bool
    span: Callable[[Any, Any], Span]
    tower: Tower
    end_of_turn: Callable[[Any], int | None]


def square_span(config: Any, feature: Any) -> Span:
    """Return the span of a picture that is one square of tokens."""
    side = round(feature.mm_position.length**0.5)
    return Span(feature.mm_position.offset, (1, side, side))


def merged_span(config: Any, feature: Any) -> Span:
    """Return the span of a picture or video whose grid of patches is merged by squares, as on the Qwens."""
    frames, height, width = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
    merge = config.vision_config.spatial_merge_size
    grid = (frames, height // merge, width // merge)
    starts = tuple(first for first, _ in feature.mm_position.extract_embeds_range())
    # Where text stands between the frames, each frame begins somewhere of its own.
    return Span(starts if len(starts) == frames else starts[0], grid)


CLIP = Tower(
    layers="vision_tower.vision_model.encoder.layers",
    projection="self_attn.qkv_proj",
    depth=lambda config: config.vision_config.num_hidden_layers,
    class_token=True,
    merged=lambda config: 1,
)
QWEN = Tower(
    layers="visual.blocks",
    projection="attn.qkv",
    depth=lambda config: config.vision_config.depth,
    class_token=False,
    merged=lambda config: config.vision_config.spatial_merge_size**2,
)
FAMILIES = {
    "LlavaForConditionalGeneration": Family("llava", False, square_span, CLIP, lambda config: None),
    "Qwen2VLForConditionalGeneration": Family("qwen2_vl", True, merged_span, QWEN, end_of_answer),
    "Qwen3VLForConditionalGeneration": Family("qwen3_vl", True, merged_span, QWEN, end_of_answer),
}
"""By the architecture's name in the model's configuration."""


def register() -> None:
    """Register the pruned classes beside the stock ones, which stay what they are."""
    for architecture, family in FAMILIES.items():
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"vllm_vtr.models.{family.module}:{name}")


def family_of(hf_config: Any) -> Family:
    """Return the family of a model that `configuration` has switched to its pruned class."""
    return FAMILIES[hf_config.architectures[0].removeprefix(PREFIX)]


def num_visual_tokens(features: Sequence[Any]) -> int:
    """Return how many visual tokens a request has, given vLLM's features of its pictures and videos."""
    return sum(feature.mm_position.get_num_embeds() for feature in features or ())


def ends_with_text(prompt: int, features: Sequence[Any]) -> bool:
    """Return whether text follows the visual tokens of a prompt of so many tokens."""
    return all(feature.mm_position.extract_embeds_range()[-1][1] < prompt - 1 for feature in features)
