"""Prompts whose image tokens are replaced by visual tokens."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IMAGE_TOKEN_INDEX
from strategy import Layout, Span
from strategy.kernels.transfers import to_device


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
    embed: Callable[[Tensor], Tensor],
    ids: Tensor,
    attention_mask: Tensor | None,
    visuals: Sequence[Visual],
    device: torch.device,
) -> tuple[Tensor, Tensor, Layout]:
    """Embed prompts with their pictures and videos, padded on the left.

    Args:
        embed: Embeds token ids.
        ids: Token ids [B, S] with `IMAGE_TOKEN_INDEX` for each frame, on the CPU: where visual tokens go depends on
            them.
        attention_mask: A mask [B, S], 0 at padding, on either side, on the CPU.
        visuals: The pictures and videos, in the order of the prompts.
        device: Where `embed` wants the ids.

    Returns:
        Embeddings [B, L, C], an attention mask [B, L], and the visual layout.

    Raises:
        ValueError: The number of frames is not that of image tokens.
    """
    real = torch.ones_like(ids) if attention_mask is None else attention_mask
    # Padding on either side goes; padding between the turns of a conversation stays, as the cache has it.
    borders = [(int(row.argmax()), row.shape[0] - int(row.flip(0).argmax())) for row in real.bool().int()]
    prompts = [own[first:end] for own, (first, end) in zip(ids, borders, strict=True)]
    masks = [own[first:end] for own, (first, end) in zip(real, borders, strict=True)]
    wanted = sum(int((own == IMAGE_TOKEN_INDEX).sum()) for own in prompts)
    found = sum(len(visual.parts) for visual in visuals)
    if wanted != found:
        raise ValueError(f"the prompts have {wanted} image tokens, but {found} images were given")
    frames = ((visual, number) for visual in visuals for number in range(len(visual.parts)))
    rows = [_with_visual_tokens(own, mask, frames) for own, mask in zip(prompts, masks, strict=True)]
    tokens = pad_sequence([row.ids for row in rows], batch_first=True, padding_side="left")
    mask = pad_sequence([row.mask for row in rows], batch_first=True, padding_side="left").long()
    # A copy, since a hook may have made a leaf of what `embed` returns, which nothing may be written into.
    embeddings = embed(to_device(tokens, device)).clone()
    layout = []
    for number, row in enumerate(rows):
        pad = tokens.shape[1] - len(row.ids)
        embeddings[number, :pad] = 0
        spans = []
        for visual, starts in row.placed:
            moved = tuple(pad + start for start in starts)
            spans.append(Span(moved, visual.grid, visual.lead))
            for start, part in zip(moved, visual.parts, strict=True):
                embeddings[number, start : start + len(part)] = part.to(embeddings.device)
        layout.append(spans)
    return embeddings, to_device(mask, embeddings.device), layout


class _Row(NamedTuple):
    """A prompt with room for its visual tokens.

    ids: [L], 0 for each visual token. mask: [L]. placed: The pictures and videos, with the index of each frame's first
    token.
    """

    ids: Tensor
    mask: Tensor
    placed: list[tuple[Visual, list[int]]]


def _with_visual_tokens(ids: Tensor, mask: Tensor, frames: Iterator[tuple[Visual, int]]) -> _Row:
    """Return a prompt with room for its visual tokens.

    Args:
        ids: Token ids [S] with `IMAGE_TOKEN_INDEX` for each frame.
        mask: A mask [S].
        frames: The frames that are not yet placed, each with its number in its picture or video; the prompt takes as
            many as it has image tokens.
    """
    parts: list[Tensor] = []
    masks: list[Tensor] = []
    placed: list[tuple[Visual, list[int]]] = []
    length = 0
    borders = [-1, *(ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist(), len(ids)]
    for number, (before, end) in enumerate(itertools.pairwise(borders)):
        if number:
            visual, frame = next(frames)
            if frame == 0:
                placed.append((visual, []))
            placed[-1][1].append(length)
            parts.append(ids.new_zeros(len(visual.parts[frame])))
            masks.append(mask.new_ones(len(visual.parts[frame])))
            length += len(visual.parts[frame])
        parts.append(ids[before + 1 : end])
        masks.append(mask[before + 1 : end])
        length += end - before - 1
    return _Row(torch.cat(parts), torch.cat(masks), placed)


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
