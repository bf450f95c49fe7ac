"""The backbone of every Qwen-VL."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strategy import Backbone, GreedyRequest, Layout, Span
from strategy.backbone import Generate


class QwenBackbone(Backbone):
    """A Qwen-VL, whose images have a number of tokens that depends on their size."""

    nominal_tokens = 576
    own_size = True

    def decoder(self, model: Any) -> nn.Module:
        return model.model.language_model

    def entry(self, model: Any) -> nn.Module:
        return model.model

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        # A kind that merely counts tokens may come before those that rotate: time, row and column.
        kinds = positions.expand(3, *positions.shape) if positions.dim() == 2 else positions[-3:]
        return super().rotary_at(decoder, kinds)

    def greedy_loop(self, model: Any, generate: Generate) -> dict[str, Any]:
        return {"generate": partial(_generate, model.generate, generate)}

    def vision(self, model: Any) -> list[nn.Module]:
        return [model.model.visual]

    def num_template_tokens(self, model: Any, kwargs: Mapping[str, Any]) -> list[int] | None:
        # The question's turn ends with the token that answers end with too.
        eos_ids = model.generation_config.eos_token_id
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or eos_ids is None:
            return None
        end = eos_ids[0] if isinstance(eos_ids, list) else eos_ids
        masks = (mask if mask is not None and mask.dim() == 2 else torch.ones_like(ids)).tolist()
        rows = [[t for t, real in zip(*pair, strict=True) if real] for pair in zip(ids.tolist(), masks, strict=True)]
        return [row[::-1].index(end) + 1 if end in row else 0 for row in rows]

    def visual_samples(self, model: Any, kwargs: Mapping[str, Any]) -> int:
        config, ids = model.config, kwargs.get("input_ids")
        if ids is None:
            pixels = (kwargs.get(name) for name in ("pixel_values", "pixel_values_videos"))
            return len(kwargs["inputs_embeds"]) if any(each is not None for each in pixels) else 0
        return int(((ids == config.image_token_id) | (ids == config.video_token_id)).any(1).sum())

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
        return [list(_spans(row, grids, arguments)) for row in ids.tolist()]


# Options of `generate` that ask for another loop than the greedy one. transformers does not pass all of them to a
# custom loop.
OTHER_LOOPS = (
    "do_sample",
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "constraints",
    "force_words_ids",
)
OTHER_ARGUMENTS = ("custom_generate", "streamer", "assistant_model", "tokenizer", "synced_gpus")
# Options of `generate` that ask for more than token ids, or for another prefill.
OTHER_OUTPUTS = (
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "prefill_chunk_size",
)


def _generate(
    stock: Callable[..., Any],
    generate: Generate,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the stock `generate`, with the loop `_loop` in place of the greedy one."""
    model = stock.__self__  # type: ignore[attr-defined]
    config = kwargs.get("generation_config") or model.generation_config
    wanted = {name: kwargs.get(name, getattr(config, name, None)) for name in (*OTHER_LOOPS, "num_beams")}
    other = any(wanted[name] for name in OTHER_LOOPS) or (wanted["num_beams"] or 1) > 1
    if other or any(map(kwargs.get, OTHER_ARGUMENTS)):
        return stock(*args, **kwargs)
    return stock(*args, custom_generate=partial(_loop, generate), **kwargs)


def _loop(
    generate: Generate,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Tensor:
    """Replace `_sample`, the loop of `generate` since transformers 4.48."""

    def stock(criteria: Any) -> Tensor:
        return type(model)._sample(
            model, input_ids, logits_processor, criteria, generation_config=generation_config, **kwargs
        )

    pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    request = GreedyRequest(
        prompt_length=input_ids.shape[1],
        num_ids=input_ids.shape[1],
        processors=logits_processor,
        stopping_criteria=stopping_criteria,
        eos_ids=[] if ends is None else ends.flatten().tolist(),
        pad_id=None if pad is None else int(pad),
        cache=kwargs.get("past_key_values"),
        token_ids_only=not any(getattr(generation_config, name, None) for name in OTHER_OUTPUTS)
        and bool(kwargs.get("use_cache")),
    )
    return generate(stock, request)


def _merged(grids: Tensor | None, merge: int) -> Iterator[tuple[int, int, int]]:
    """Yield the grids of visual tokens (T, H, W) for grids of patches [count, 3]."""
    rows = [] if grids is None else grids.tolist()
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
        yield Span(tuple(starts), grid)
