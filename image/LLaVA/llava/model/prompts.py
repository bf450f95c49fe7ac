"""Prompts whose image tokens are replaced by visual tokens."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from strategy import Layout, Span


class Visual(NamedTuple):
    """A picture or a video.

    Attributes:
        parts: The visual tokens [n, hidden size] that replace each of its image tokens, one for each frame.
        grid: The grid (T, H, W) of all its visual tokens.
        lead: See `strategy.Span`.
    """

    parts: Sequence[Tensor]
    grid: tuple[int, int, int]
    lead: int = 0


def embed_prompts(
    embed: Callable[[Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor | None, visuals: Sequence[Visual]
) -> tuple[Tensor, Tensor, Layout]:
    """Embed prompts with their pictures and videos, padded on the left.

    Args:
        embed: Embeds token ids.
        input_ids: Token ids [B, S] with `IMAGE_TOKEN_INDEX` for each frame.
        attention_mask: A mask [B, S], 0 at padding, on either side.
        visuals: The pictures and videos, in the order of the prompts.

    Returns:
        Embeddings [B, L, C], an attention mask [B, L], and the visual layout.

    Raises:
        ValueError: The number of frames is not that of image tokens.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    # Padding on either side goes; padding between the turns of a conversation stays, as the cache has it.
    borders = [(int(row.argmax()), row.shape[0] - int(row.flip(0).argmax())) for row in real.bool().int()]
    prompts = [ids[first:end] for ids, (first, end) in zip(input_ids, borders, strict=True)]
    masks = [mask[first:end] for mask, (first, end) in zip(real, borders, strict=True)]
    wanted = sum(int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in prompts)
    found = sum(len(visual.parts) for visual in visuals)
    if wanted != found:
        raise ValueError(f"the prompts have {wanted} image tokens, but {found} images were given")
    frames = ((visual, number) for visual in visuals for number in range(len(visual.parts)))
    rows = [_embed_prompt(embed, ids, mask, frames) for ids, mask in zip(prompts, masks, strict=True)]
    length = max(len(row) for row, _, _ in rows)
    first_row = rows[0][0]
    embeddings = first_row.new_zeros(len(rows), length, first_row.shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=embeddings.device)
    layout = []
    for number, (row, row_mask, placed) in enumerate(rows):
        pad = length - len(row)
        embeddings[number, pad:], mask[number, pad:] = row, row_mask
        layout.append(
            [Span(tuple(pad + start for start in starts), visual.grid, visual.lead) for visual, starts in placed]
        )
    return embeddings, mask, layout


def _embed_prompt(
    embed: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor, frames: Iterator[tuple[Visual, int]]
) -> tuple[Tensor, Tensor, list[tuple[Visual, list[int]]]]:
    """Embed a prompt.

    Args:
        embed: Embeds token ids.
        ids: Token ids [S] with `IMAGE_TOKEN_INDEX` for each frame.
        mask: A mask [S].
        frames: The frames that are not yet placed, each with its number in its picture or video; the prompt takes as
            many as it has image tokens.

    Returns:
        Embeddings [L, C], a mask [L], and the pictures and videos with the index of each frame's first token.
    """
    parts: list[Tensor] = []
    masks: list[Tensor] = []
    placed: list[tuple[Visual, list[int]]] = []
    borders = [-1, *(ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist(), len(ids)]
    for number, (before, end) in enumerate(itertools.pairwise(borders)):
        text = embed(ids[before + 1 : end])
        if number:
            visual, frame = next(frames)
            if frame == 0:
                placed.append((visual, []))
            placed[-1][1].append(sum(map(len, parts)))
            parts.append(visual.parts[frame].to(text.device))
            masks.append(mask.new_ones(len(visual.parts[frame])))
        parts.append(text)
        masks.append(mask[before + 1 : end])
    return torch.cat(parts), torch.cat(masks), placed


def question_ids(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the token ids behind the last image token of each prompt [S], without padding."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, real, strict=True)]
    behind = [ids[::-1].index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else len(ids) for ids in prompts]
    return [ids[len(ids) - count :] for ids, count in zip(prompts, behind, strict=True)]


def spans_behind(spans: Sequence[Span], held: int) -> list[Span]:
    """Return those of a prompt's spans that begin behind its first tokens, which a cache holds, in their numbering."""
    starts = ((span, (span.start,) if isinstance(span.start, int) else span.start) for span in spans)
    return [span._replace(start=tuple(at - held for at in own)) for span, own in starts if own[0] >= held]


def positions(mask: Tensor) -> Tensor:
    """Return the position ids of prompts [B, L], which count tokens that are no padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
