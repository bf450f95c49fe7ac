"""The model families that the plug-in prunes: one row each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import ModelRegistry

from strategy.backbone import Span

PREFIX = "Pruned"


@dataclass(frozen=True)
class Family:
    """What the plug-in has to know of a family.

    Attributes:
        module: Where the stock class is, in vLLM's models, and the pruned one, in those of this package.
        own_size: See `strategy.Facts`.
        span: Returns the span of a picture or video, given the model's configuration and vLLM's feature of it.
    """

    module: str
    own_size: bool
    span: Callable[[Any, Any], Span]


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


FAMILIES = {
    "LlavaForConditionalGeneration": Family("llava", own_size=False, span=square_span),
    "Qwen2VLForConditionalGeneration": Family("qwen2_vl", own_size=True, span=merged_span),
    "Qwen3VLForConditionalGeneration": Family("qwen3_vl", own_size=True, span=merged_span),
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
