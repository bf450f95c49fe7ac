"""What the pruning engine needs to know of every Qwen-VL."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strategy import Asked, Backbone, Layout, Span


class QwenBackbone(Backbone):
    """A Qwen-VL: as many tokens an image as it is large."""

    nominal_tokens = 576
    own_size = True

    def decoder(self, model: Any) -> nn.Module:
        return model.model.language_model

    def entry(self, model: Any) -> nn.Module:
        return model.model

    def angles(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        # A kind that merely counts may come before those that rotate: time, row and column.
        kinds = positions.expand(3, *positions.shape) if positions.dim() == 2 else positions[-3:]
        return super().angles(decoder, kinds)

    def greedy(self, model: Any, answer: Callable[[Callable[[Any], Tensor], Asked], Tensor]) -> dict[str, Any]:
        return {"generate": partial(_generate, model.generate, answer)}

    def vision(self, model: Any) -> list[nn.Module]:
        return [model.model.visual]

    def closing(self, model: Any, call: Mapping[str, Any]) -> list[int] | None:
        # The question's turn ends with the token that answers end with too.
        ends, ids, mask = model.generation_config.eos_token_id, call.get("input_ids"), call.get("attention_mask")
        if ids is None or ends is None:
            return None
        end = ends[0] if isinstance(ends, list) else ends
        masks = (mask if mask is not None and mask.dim() == 2 else torch.ones_like(ids)).tolist()
        rows = [[t for t, real in zip(*pair, strict=True) if real] for pair in zip(ids.tolist(), masks, strict=True)]
        return [row[::-1].index(end) + 1 if end in row else 0 for row in rows]

    def layout(self, model: Any, call: Mapping[str, Any]) -> Layout | None:
        config, ids = model.config, call.get("input_ids")
        given = {config.image_token_id: "image_grid_thw", config.video_token_id: "video_grid_thw"}
        if all(call.get(name) is None for name in given.values()):
            return None
        if ids is None:
            raise ValueError(
                f"{' or '.join(given.values())} came without token ids: pass input_ids, not inputs_embeds, "
                "since the ids tell where the visual tokens lie"
            )
        merge = config.vision_config.spatial_merge_size
        grids = {token: _merged(call.get(name), merge) for token, name in given.items()}
        return [list(_spans(row, grids, given)) for row in ids.tolist()]


# What the greedy loop is not asked for by any of these; transformers would forget some of them on its way there.
PLAIN = ("do_sample", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "constraints", "force_words_ids")
ELSE = ("custom_generate", "streamer", "assistant_model", "tokenizer", "synced_gpus")


def _generate(
    stock: Callable[..., Any],
    answer: Callable[[Callable[[Any], Tensor], Asked], Tensor],
    *args: Any,
    **call: Any,
) -> Any:
    """`generate`, with `answer` in the place of its loop if that is the greedy one."""
    model = stock.__self__  # type: ignore[attr-defined]
    config = call.get("generation_config") or model.generation_config
    wanted = {name: call.get(name, getattr(config, name, None)) for name in (*PLAIN, "num_beams")}
    if any(wanted[name] for name in PLAIN) or (wanted["num_beams"] or 1) > 1 or any(map(call.get, ELSE)):
        return stock(*args, **call)
    return stock(*args, custom_generate=partial(_loop, answer), **call)


def _loop(
    answer: Callable[[Callable[[Any], Tensor], Asked], Tensor],
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **call: Any,
) -> Tensor:
    """`_sample`, the loop of `generate` since transformers 4.48, with `answer` in its place."""

    def stock(criteria: Any) -> Tensor:
        return type(model)._sample(
            model, input_ids, logits_processor, criteria, generation_config=generation_config, **call
        )

    pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    extra = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
    extra += ("return_dict_in_generate", "prefill_chunk_size")
    asked = Asked(
        prompt=input_ids.shape[1],
        ids=input_ids.shape[1],
        processors=logits_processor,
        criteria=stopping_criteria,
        ends=[] if ends is None else ends.flatten().tolist(),
        pad=None if pad is None else int(pad),
        cache=call.get("past_key_values"),
        plain=not any(getattr(generation_config, name, None) for name in extra) and bool(call.get("use_cache")),
    )
    return answer(stock, asked)


def _merged(grids: Tensor | None, merge: int) -> Iterator[tuple[int, int, int]]:
    """The grids of visual tokens (T, H, W) that grids of patches [count, 3] become."""
    rows = [] if grids is None else grids.tolist()
    return iter([(frames, height // merge, width // merge) for frames, height, width in rows])


def _spans(
    row: list[int], grids: Mapping[int, Iterator[tuple[int, int, int]]], names: Mapping[int, str]
) -> Iterator[Span]:
    """The spans of one prompt's token ids; takes from `grids`, by placeholder token, what it meets."""
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
