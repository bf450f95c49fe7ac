"""Where pictures lie among the placeholder tokens of a prompt."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from qwen_vl_vtr import ConditionalGenerationBackbone
from strategy import LayerSpec, Layout, Span


class EncodingFirst:
    """A mixin for models whose `generate` encodes pictures in front of the model itself, as on transformers 5.24."""

    encoder_methods: tuple[str, ...] = ("get_image_features", "get_video_features")
    vision_graphs = False  # not tried on a GPU yet


class Picture(NamedTuple):
    """One image or video.

    spans: Its spans, with starts counted from its first placeholder token. size: How many of these tokens it has.
    """

    spans: Sequence[Span]
    size: int


class PlaceholderBackbone(EncodingFirst, ConditionalGenerationBackbone):
    """A model with a vision tower and a projector, whose prompts have a placeholder token for each visual token."""

    nominal_tokens = 576  # as on the Qwens, so that a budget in tokens means the same share of a picture everywhere
    own_size = True

    def vision(self, model: Any) -> list[nn.Module]:
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def layer_spec(self, layer: nn.Module) -> LayerSpec:
        spec: LayerSpec = super().layer_spec(layer)
        # A Mistral's attention keeps the window in its configuration only.
        window = layer.self_attn.config.sliding_window if isinstance(layer, MistralDecoderLayer) else None
        return spec if window is None else replace(spec, window=window, attention="window")

    @abstractmethod
    def pictures(self, model: Any, kwargs: Mapping[str, Any]) -> dict[int, Iterable[Picture]]:
        """Return the pictures that came with the prompts, in order, by their placeholder token; none for text."""

    def layout(self, model: Any, kwargs: Mapping[str, Any]) -> Layout | None:
        pictures = {token: iter(given) for token, given in self.pictures(model, kwargs).items()}
        return [list(_placed(row, pictures)) for row in token_ids(kwargs).tolist()] if pictures else None


class TiledBackbone(PlaceholderBackbone):
    """A model whose pictures are one or several tiles of the same number of tokens, each with a grid of its own."""

    @abstractmethod
    def tile(self, config: Any) -> tuple[int, int]:
        """Return rows and columns of the visual tokens of a tile."""

    def pictures(self, model: Any, kwargs: Mapping[str, Any]) -> dict[int, Iterable[Picture]]:
        if kwargs.get("pixel_values") is None:
            return {}
        token, (height, width) = model.config.image_token_id, self.tile(model.config)
        lengths = (len(list(run)) for row in token_ids(kwargs).tolist() for id_, run in groupby(row) if id_ == token)
        return {token: [tiles(max(1, length // (height * width)), height, width) for length in lengths]}


def tiles(count: int, height: int, width: int) -> Picture:
    """Return a picture of several grids, one behind the other."""
    size = height * width
    return Picture([Span(number * size, (1, height, width)) for number in range(count)], count * size)


def mean_of_blocks(values: Tensor, block: int) -> Tensor:
    """Return the means [P, N, D] of block x block neighbours on square grids of values [P, L, D], row by row."""
    side = math.isqrt(values.shape[1])
    blocks = values.unflatten(1, (side // block, block, side // block, block))
    return blocks.mean(dim=(2, 4)).flatten(1, 2)


def token_ids(kwargs: Mapping[str, Any]) -> Tensor:
    """Return the token ids of the entry's forward call.

    Raises:
        ValueError: There are none.
    """
    ids: Tensor | None = kwargs.get("input_ids")
    if ids is None:
        raise ValueError("pass input_ids, not inputs_embeds, since the ids tell where the visual tokens lie")
    return ids


def _placed(row: list[int], pictures: Mapping[int, Iterator[Picture]]) -> Iterator[Span]:
    """Yield the spans of a prompt, and take its pictures out of those that are not yet placed.

    Raises:
        ValueError: The prompt and the pictures do not agree.
    """
    at = 0
    while at < len(row):
        token = row[at]
        if token not in pictures:
            at += 1
            continue
        picture = next(pictures[token], None)
        if picture is None:
            raise ValueError(f"the prompts hold more placeholder tokens ({token}) than those of the pictures given")
        if row[at : at + picture.size] != [token] * picture.size:
            raise ValueError(
                f"the placeholder tokens ({token}) from {at} on are not the {picture.size} of a picture of the grids "
                f"{', '.join(str(span.grid) for span in picture.spans)}: give token ids and pixels as one call of the "
                "processor returns them"
            )
        yield from (span._replace(start=int(span.start) + at) for span in picture.spans)  # type: ignore[arg-type]
        at += picture.size
