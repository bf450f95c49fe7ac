"""The state of one pruned forward call: which tokens are left, and where they now are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from strategy.attention import rows_of
from strategy.backbone import Layout, Span
from strategy.base import Grid
from strategy.record import Stage


@dataclass
class Group:
    """Samples of a batch with the same grids, so that one tensor holds them all.

    samples: their numbers in the batch; rows: the same on the device. left: [G, R], their tokens still
    there, as indices of the whole prompt. visual, text: the places in `left` of the visual and of the
    other tokens. number: [G, N], the visual tokens still there, in the numbering of the unpruned ones.
    """

    samples: list[int]
    rows: Tensor
    grids: tuple[Grid, ...]
    left: Tensor
    visual: Tensor
    text: Tensor
    number: Tensor

    @property
    def whole(self) -> int:
        """How many visual tokens each sample had before the first prune."""
        return sum(map(math.prod, self.grids))

    def keep(self, chosen: Tensor) -> Tensor:
        """Drop the visual tokens not in `chosen` [G, N'], in order; returns the places that stay in `left`."""
        visual = self.visual.gather(1, chosen)
        stay = torch.cat([visual, self.text], dim=1).sort(dim=1).values
        self.left, self.number = self.left.gather(1, stay), self.number.gather(1, chosen)
        self.visual, self.text = torch.searchsorted(stay, visual), torch.searchsorted(stay, self.text)
        return stay


@dataclass
class Prefill:
    """The state of one forward call over prompts with visual tokens.

    real: [B, S], False for the prompts' own padding. last: [B, 1], each prompt's last token. takes: for
    each prune, the places [B, L] in the sequence before it of what is left. index: [B, L], what is left,
    as indices of the whole prompt; None while everything is. padding: [B, L], True where a sample that
    lost more than another was filled up on the left; None if nowhere.
    """

    groups: list[Group]
    real: Tensor
    last: Tensor
    takes: list[Tensor] = field(default_factory=list)
    index: Tensor | None = None
    padding: Tensor | None = None
    reference: Tensor | None = None
    narrowed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)

    @classmethod
    def start(cls, layout: Layout, tokens: Tensor, mask: Tensor | None) -> "Prefill":
        """Begin with prompts [B, S, ...], their layout and their padding mask [B, S] if they have one."""
        (batch, length), device = tokens.shape[:2], tokens.device
        alike: dict[tuple[Grid, ...], list[tuple[int, list[int]]]] = {}
        for sample, spans in enumerate(checked(layout, batch, length)):
            places = [at for start, grid in spans for at in range(start, start + math.prod(grid))]
            alike.setdefault(tuple(grid for _, grid in spans), []).append((sample, places))
        groups = []
        for grids, members in alike.items():
            visual = [places for _, places in members]
            text = [sorted(set(range(length)).difference(places)) for places in visual]
            samples = [sample for sample, _ in members]
            group = Group(
                samples=samples,
                rows=torch.tensor(samples, device=device),
                grids=grids,
                left=torch.arange(length, device=device).expand(len(members), -1),
                visual=torch.tensor(visual, dtype=torch.long, device=device),
                text=torch.tensor(text, dtype=torch.long, device=device),
                number=torch.arange(len(visual[0]), device=device).expand(len(members), -1),
            )
            groups.append(group)
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is not None and mask.dim() == 2:
            real = mask.bool()
        last = (real * torch.arange(length, device=device)).amax(dim=1, keepdim=True)
        return cls(groups, real, last)

    def of(self, group: Group, tensor: Tensor) -> Tensor:
        """The group's samples of a tensor [B or 1, ...]."""
        return tensor if len(self.groups) == 1 or len(tensor) == 1 else tensor[group.rows]

    def drop(self, stays: list[Tensor], hidden: Tensor) -> Tensor:
        """Keep of hidden [B, L, C] what stays: for each group its places [G, R], once `Group.keep` is done."""
        length = max(stay.shape[1] for stay in stays)
        take, index, filled = (
            self._assemble(parts, length)
            for parts in (stays, [g.left for g in self.groups], [torch.ones_like(stay) for stay in stays])
        )
        self.takes.append(take)
        self.index, self.narrowed = index, {}
        self.padding = filled == 0 if any(stay.shape[1] < length for stay in stays) else None
        return rows_of(hidden, take)

    def _assemble(self, parts: Iterable[Tensor], length: int) -> Tensor:
        rows: dict[int, Tensor] = {}
        for group, part in zip(self.groups, parts, strict=True):
            rows |= zip(group.samples, F.pad(part, (length - part.shape[1], 0)), strict=True)
        return torch.stack([rows[sample] for sample in range(len(rows))])

    def kept(self) -> tuple[Tensor, ...]:
        """The visual tokens each sample still has, in the numbering of its unpruned ones."""
        rows = {s: n for g in self.groups for s, n in zip(g.samples, g.number, strict=True)}
        return tuple(rows[sample] for sample in range(len(rows)))

    def narrow(self, name: str, given: Any, mask_4d: bool) -> Any:
        """Cut one keyword argument of a decoder layer, made for the whole prompt, down to what is left.

        mask_4d: whether the attention wants [B, 1, L, L] where a mask is needed and none was given.
        """
        known, narrowed = self.narrowed.get(name, (self, None))
        # The decoder's loop passes the same objects to all layers: once a stage is enough.
        if known is not given:
            narrowed = self._narrow(name, given, mask_4d)
            self.narrowed[name] = (given, narrowed)
        return narrowed

    def _narrow(self, name: str, given: Any, mask_4d: bool) -> Any:
        assert self.index is not None
        index = self.index
        if name == "attention_mask":
            return self._narrow_mask(given, mask_4d)
        if given is None:
            return None
        if name == "cache_position":
            return given[: index.shape[1]]
        if name == "position_ids":
            return given.take_along_dim(index[(None,) * (given.dim() - 2)], -1)
        return tuple(table.take_along_dim(index[(None,) * (table.dim() - 3)][..., None], -2) for table in given)

    def _narrow_mask(self, given: Tensor | None, mask_4d: bool) -> Tensor | None:
        assert self.index is not None
        index, padding = self.index, self.padding
        if given is None:
            if padding is None:
                return None
            if not mask_4d:
                return ~padding
            seen = torch.ones(index.shape[1], index.shape[1], dtype=torch.bool, device=index.device).tril()
            mask = seen.expand(len(index), 1, -1, -1)
        elif given.dim() == 2:
            mask = given.gather(1, index)
            return mask if padding is None else mask.masked_fill(padding, 0)
        else:
            mask = given.take_along_dim(index[:, None, :, None], -2).take_along_dim(index[:, None, None], -1)
        if padding is None:
            return mask
        # A row that sees nothing would be NaN, and NaN spreads: what only fills up sees itself.
        itself = torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
        hidden = padding[:, None, None] & ~itself
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def cache_places(self, pruned_before: int) -> Tensor | None:
        """Places [B, L] in a layer's cache of what is left at the end, if so many prunes came before it."""
        places: Tensor | None = None
        for take in reversed(self.takes[pruned_before:]):
            places = take if places is None else take.gather(1, places)
        return places

    def real_slots(self) -> Tensor:
        """Which of the tokens left are neither a prompt's own padding nor filled in, [B, L]."""
        assert self.index is not None
        real = self.real.gather(1, self.index)
        return real if self.padding is None else real & ~self.padding


def checked(layout: Layout, batch: int, length: int) -> list[list[Span]]:
    """A layout in order of its spans; ValueError if it does not fit prompts [batch, length]."""
    if len(layout) != batch:
        raise ValueError(f"the layout tells of {len(layout)} samples, the batch has {batch}")
    ordered = []
    for sample, given in enumerate(layout):
        spans = sorted(Span(int(start), tuple(map(int, grid))) for start, grid in given)  # type: ignore[arg-type]
        end = 0
        for start, grid in spans:
            if len(grid) != 3 or min(grid) < 1:
                raise ValueError(f"sample {sample}: grid {grid} is not three numbers from 1 up (T, H, W)")
            if start < end:
                raise ValueError(f"sample {sample}: the span at {start} begins before {end}, inside another one")
            end = start + math.prod(grid)
        if end >= length:
            raise ValueError(
                f"sample {sample}: the visual tokens end at {end} of {length} tokens, but text must follow them"
            )
        ordered.append(spans)
    return ordered
