"""The backbone of every Qwen-VL."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from qwen_vl_vtr.conditional_generation import ConditionalGenerationBackbone
from qwen_vl_vtr.host_methods import HOST_METHODS
from strategy import Layout, Span
from strategy.backbone import EncoderSpec, FasterMethod
from strategy.kernels.selection import mean_of_neighbours
from strategy.kernels.tower_attention import packed_forward
from strategy.kernels.transfers import host_copy


class QwenBackbone(ConditionalGenerationBackbone):
    """A Qwen-VL, whose images have a number of tokens that depends on their size."""

    nominal_tokens = 576
    own_size = True

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        # A kind that merely counts tokens may come before those that rotate: time, row and column.
        kinds = positions.expand(3, *positions.shape) if positions.dim() == 2 else positions[-3:]
        return super().rotary_at(decoder, kinds)

    def vision(self, model: Any) -> list[nn.Module]:
        return [model.model.visual]

    def pieces(self, module: nn.Module, arguments: Mapping[str, Any]) -> Sequence[int] | None:
        grids = arguments.get("grid_thw")
        if grids is None:  # of a module around the tower
            return None
        return [height * width for frames, height, width in host_copy(grids).tolist() for _ in range(frames)]

    def encoder(self, model: Any) -> EncoderSpec | None:
        tower = model.model.visual
        return EncoderSpec(
            tower.blocks,
            query="attn.qkv",
            key="attn.qkv",
            heads=tower.config.num_heads,
            class_token=False,
            rotary="position_embeddings",
            ends="cu_seqlens",
            merge=partial(mean_of_neighbours, count=tower.spatial_merge_size**2),
        )

    def faster_methods(self, model: Any) -> list[FasterMethod]:
        tower = model.model.visual
        if tower.config._attn_implementation not in ("sdpa", "eager"):
            return []  # kernels of other libraries stay, as the user chose them
        names = {"query": "qkv", "output": "proj", "rotary": "position_embeddings", "ends": "cu_seqlens"}
        forward = packed_forward(heads=tower.config.num_heads, **names)
        attention: list[FasterMethod] = [(block.attn, "forward", forward) for block in tower.blocks]
        return attention + [(model.model, *each) for each in HOST_METHODS.items()]

    def layout(self, model: Any, kwargs: Mapping[str, Any]) -> Layout | None:
        config, ids = model.config, kwargs.get("input_ids")
        arguments = {config.image_token_id: "image_grid_thw", config.video_token_id: "video_grid_thw"}
        if all(kwargs.get(name) is None for name in arguments.values()):
            return None
        if ids is None:
            raise ValueError(
                f"{' or '.join(arguments.values())} came without token ids: pass input_ids, not inputs_embeds, "
                "since the ids tell where the visual tokens lie"
            )
        merge = config.vision_config.spatial_merge_size
        grids = {token: _merged(kwargs.get(name), merge) for token, name in arguments.items()}
        return [list(_spans(row, grids, arguments)) for row in host_copy(ids).tolist()]


def _merged(grids: Tensor | None, merge: int) -> Iterator[tuple[int, int, int]]:
    """Yield the grids of visual tokens (T, H, W) for grids of patches [count, 3]."""
    rows = [] if grids is None else host_copy(grids).tolist()
    return iter([(frames, height // merge, width // merge) for frames, height, width in rows])


def _spans(
    row: list[int], grids: Mapping[int, Iterator[tuple[int, int, int]]], names: Mapping[int, str]
) -> Iterator[Span]:
    """Yield the spans of a prompt.

    Args:
        row: The prompt's token ids.
        grids: The grids of the images and of the videos that are not yet placed, by placeholder token.
        names: The argument that gave these grids, by placeholder token.

    Raises:
        ValueError: The prompt and the grids do not agree.
    """
    at = 0
    while at < len(row):
        token = row[at]
        if token not in grids:
            at += 1
            continue
        grid = next(grids[token], None)
        if grid is None:
            raise ValueError(f"{names[token]}: the prompts hold more visual tokens than it has rows for")
        frames, height, width = grid
        starts = []
        for _ in range(frames):
            # Text, such as a time stamp, may stand between the frames of a video.
            while at < len(row) and row[at] != token:
                at += 1
            starts.append(at)
            at += height * width
            if row[starts[-1] : at] != [token] * (height * width):
                raise ValueError(
                    f"{names[token]}: the visual tokens from {starts[-1]} on are not the {height * width} "
                    f"of a frame of grid {grid}"
                )
        # The tower takes images and videos apart, images first.
        yield Span(tuple(starts), grid, tower_call=list(grids).index(token))
