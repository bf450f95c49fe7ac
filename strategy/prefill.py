"""The state of one pruned forward call: which tokens are left, and where they now are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from strategy.attention import rows_of
from strategy.backbone import Layout, Span
from strategy.base import Grid
from strategy.record import Stage
from strategy.selecting import narrowed


@dataclass
class Group:
    """Samples of a batch with the same grids, so that one tensor holds them all.

    samples: their numbers in the batch; rows: the same on the device. whole: how many visual tokens each
    had before the first prune; grids, on_grid: theirs, see `View`. left: [G, R], their tokens still there,
    as indices of the whole prompt. visual, text: the places in `left` of the visual and of the other
    tokens. number: [G, N], the visual tokens still there, in the numbering of the unpruned ones. asked: [G, R],
    of the last R of `text`, which are real and stand behind the visual tokens. memo: see `View`.
    """

    samples: list[int]
    rows: Tensor
    whole: int
    grids: tuple[Grid, ...]
    on_grid: tuple[Tensor, ...]
    left: Tensor
    visual: Tensor
    text: Tensor
    number: Tensor
    asked: Tensor
    memo: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, chosen: Tensor) -> Tensor:
        """Drop the visual tokens not in `chosen` [G, N'], in order; returns the places that stay in `left`."""
        stay, self.left, self.number, self.visual, self.text = narrowed(
            self.left, self.number, self.visual, self.text, chosen
        )
        return stay


@dataclass
class Prefill:
    """The state of one forward call over prompts with visual tokens.

    real: [B, S], False for the prompts' own padding. last: [B, 1], each prompt's last token. position:
    [B, 1], the position id of the token that will follow the prompt. takes: for each prune, the places
    [B, L] in the sequence before it of what is left. index: [B, L], what is left, as indices of the whole
    prompt; None while everything is. padding: [B, L], True where a sample that lost more than another was
    filled up on the left; None if nowhere. added: see `Backbone.added`. prior: see `View`,
    [B, heads, S]. projects: whether keys must be projected anew, for want of a cache. lengths: of the sequence after
    each prune. finite: whether no score was NaN,
    and the features of the first stage and what the last layer gave were finite; a tensor once there were any.
    """

    groups: list[Group]
    real: Tensor
    last: Tensor
    position: Tensor
    takes: list[Tensor] = field(default_factory=list)
    index: Tensor | None = None
    padding: Tensor | None = None
    reference: Tensor | None = None
    added: list[Tensor] = field(default_factory=list)
    prior: Tensor | None = None
    projects: bool = False
    finite: Tensor | bool = True
    narrowed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, layout: Layout, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> "Prefill":
        """Begin with prompts [B, S, ...] and their layout.

        mask: their padding, [B, S], if they have one. positions: their position ids, [B or 1, S] or several
        kinds of them, [..., B or 1, S]; counted from 0 if they have none.
        """
        (batch, length), device = tokens.shape[:2], tokens.device
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is not None and mask.dim() == 2:
            real = mask.bool()
        alike: dict[tuple[tuple[Grid, int], ...], list[tuple[int, list[int]]]] = {}
        for sample, spans in enumerate(checked(layout, batch, length)):
            places = [at for span in spans for start in span.starts for at in range(start, start + span.frame)]
            alike.setdefault(tuple((span.grid, span.lead) for span in spans), []).append((sample, places))
        groups = []
        for kinds, members in alike.items():
            visual = [places for _, places in members]
            text = [sorted(set(range(length)).difference(places)) for places in visual]
            samples = [sample for sample, _ in members]
            rows = torch.tensor(samples, device=device)
            ends = [max(places, default=-1) for places in visual]
            tail = torch.tensor([others[min(ends) - length + 1 :] for others in text], device=device)
            asked = real[rows].gather(1, tail) & (tail > torch.tensor(ends, device=device)[:, None])
            # Where only padding follows a picture, its last token stands for the question.
            asked[:, -1] |= ~asked.any(1)
            group = Group(
                samples=samples,
                rows=rows,
                whole=len(visual[0]),
                grids=tuple(grid for grid, _ in kinds),
                on_grid=_on_grid(kinds, device),
                left=torch.arange(length, device=device).expand(len(members), -1),
                visual=torch.tensor(visual, dtype=torch.long, device=device),
                text=torch.tensor(text, dtype=torch.long, device=device),
                number=torch.arange(len(visual[0]), device=device).expand(len(members), -1),
                asked=asked,
            )
            groups.append(group)
        last = (real * torch.arange(length, device=device)).amax(dim=1, keepdim=True)
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        # The first kind may merely count tokens; a text token's are the same in all those that rotate.
        position = positions.reshape(-1, *positions.shape[-2:])[-1].take_along_dim(last, 1) + 1
        return cls(groups, real, last, position)

    def move(self, device: torch.device) -> None:
        """Go on on another device, that of the layers to come; does nothing if it is the same."""
        if device == self.real.device:
            return
        for holder in (self, *self.groups):
            for name, value in vars(holder).items():
                if isinstance(value, Tensor):
                    setattr(holder, name, value.to(device))
        for group in self.groups:
            group.on_grid = tuple(tensor.to(device) for tensor in group.on_grid)
            group.memo = {name: value.to(device) for name, value in group.memo.items()}
        self.takes = [take.to(device) for take in self.takes]

    def of(self, group: Group, tensor: Tensor) -> Tensor:
        """The group's samples of a tensor [B or 1, ...]."""
        return tensor if len(self.groups) == 1 or len(tensor) == 1 else tensor[group.rows]

    def drop(self, stays: list[Tensor], hidden: Tensor) -> Tensor:
        """Keep of hidden [B, L, C] what stays: for each group its places [G, R], once `Group.keep` is done."""
        length = max(stay.shape[1] for stay in stays)
        take, index = (self._assemble(parts, length) for parts in (stays, [group.left for group in self.groups]))
        self.takes.append(take)
        self.lengths.append(length)
        self.index, self.narrowed = index, {}
        self.padding = None
        if any(stay.shape[1] < length for stay in stays):
            self.padding = self._assemble([torch.ones_like(stay) for stay in stays], length) == 0
        return rows_of(hidden, take)

    def _assemble(self, parts: Iterable[Tensor], length: int) -> Tensor:
        if len(self.groups) == 1:
            return next(iter(parts))
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
        if name == "attention_mask":
            return self._narrow_mask(given, mask_4d)
        if given is None:
            return None
        # Where layers lie on several devices, their arguments stay where the prompt was.
        index = self.index.to(given[0].device)
        if name == "cache_position":
            return given[: index.shape[1]]
        if name == "position_ids":
            return given.take_along_dim(index[(None,) * (given.dim() - 2)], -1)
        return tuple(table.take_along_dim(index[(None,) * (table.dim() - 3)][..., None], -2) for table in given)

    def _narrow_mask(self, given: Tensor | None, mask_4d: bool) -> Tensor | None:
        assert self.index is not None
        place = self.index.device if given is None else given.device
        index, padding = self.index.to(place), None if self.padding is None else self.padding.to(place)
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

    def length(self, prunes: int) -> int:
        """How long the sequence is after so many prunes."""
        return self.lengths[prunes - 1] if prunes else self.real.shape[1]

    def dropped(self) -> list[int]:
        """The layers before which something was dropped, in order."""
        return [stage.layer for stage in self.stages if stage.after < stage.before]

    def varying(self) -> list[Tensor]:
        """Before the first prune: the tensors that differ between prompts with the same shapes and grids."""
        own = [tensor for group in self.groups for tensor in (group.visual, group.text, group.asked)]
        return [self.real, self.last, self.position, *own, *self.added, *([] if self.prior is None else [self.prior])]

    def with_varying(self, tensors: Sequence[Tensor]) -> "Prefill":
        """The same beginning with other such tensors, to be gone on from without a trace here."""
        rest = iter(tensors)
        real, last, position = (next(rest) for _ in range(3))
        groups = [
            replace(group, visual=next(rest), text=next(rest), asked=next(rest), memo={}) for group in self.groups
        ]
        added = [next(rest) for _ in self.added]
        return Prefill(groups, real, last, position, added=added, prior=next(rest, None))

    def cache_places(self, pruned_before: int) -> Tensor | None:
        """Places [B, L] in a layer's cache of what is left at the end, if so many prunes came before it."""
        places: Tensor | None = None
        for take in reversed(self.takes[pruned_before:]):
            places = take if places is None else take.gather(1, places)
        return places

    def pruned(self) -> "Pruned | None":
        """What the cache will no longer show of this prompt; None if nothing was pruned."""
        if self.index is None:
            return None
        real = self.real.gather(1, self.index)
        return Pruned(self.real.shape[1], self.position, real if self.padding is None else real & ~self.padding)

    def ends(self, length: int) -> Tensor:
        """The places [B, 1] of the prompts' last tokens when so many tokens are left."""
        return self.last + (length - self.real.shape[1])

    def left(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor [B, S, C] over the whole prompt."""
        return tensor if self.index is None else rows_of(tensor, self.index.to(tensor.device))


class Pruned(NamedTuple):
    """What a pruned cache no longer shows of its prompt.

    prompt: the whole prompt's length. position: [B, 1], the position id of the token that followed it.
    real: [B, L], False for the slots left of the prompt that are padding.
    """

    prompt: int
    position: Tensor
    real: Tensor

    def fit(self, batch: int, device: torch.device) -> "Pruned":
        """The same on a device, for a cache whose samples were repeated, each one in place, up to `batch`."""
        copies = batch // len(self.real)
        if copies == 1 and self.real.device == device:
            return self
        return Pruned(self.prompt, *(tensor.to(device).repeat_interleave(copies, 0) for tensor in self[1:]))


class Frames(NamedTuple):
    """A span with the start of each of its frames."""

    starts: tuple[int, ...]
    grid: Grid
    lead: int

    @property
    def frame(self) -> int:
        """How many tokens one frame has."""
        return self.lead + self.grid[1] * self.grid[2]


def checked(layout: Layout, batch: int, length: int) -> list[list[Frames]]:
    """The frames of each span, in order; ValueError if the layout does not fit prompts [batch, length]."""
    if len(layout) != batch:
        raise ValueError(f"the layout tells of {len(layout)} samples, the batch has {batch}")
    ordered = []
    for sample, given in enumerate(layout):
        spans = sorted(_frames(sample, Span(*span)) for span in given)
        end = 0
        for span in spans:
            for start in span.starts:
                if start < end:
                    raise ValueError(f"sample {sample}: the span at {start} begins before {end}, inside another one")
                end = start + span.frame
        if end >= length:
            raise ValueError(
                f"sample {sample}: the visual tokens end at {end} of {length} tokens, but text must follow them"
            )
        ordered.append(spans)
    return ordered


def _frames(sample: int, span: Span) -> Frames:
    grid, lead = tuple(map(int, span.grid)), int(span.lead)
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"sample {sample}: grid {grid} is not three numbers from 1 up (T, H, W)")
    if lead < 0:
        raise ValueError(f"sample {sample}: lead={lead}, want the number of tokens before each frame's patches")
    if isinstance(span.start, Sequence):
        starts = tuple(map(int, span.start))
    else:
        starts = tuple(int(span.start) + frame * (lead + grid[1] * grid[2]) for frame in range(grid[0]))
    if len(starts) != grid[0]:
        raise ValueError(f"sample {sample}: grid {grid} has {grid[0]} frames, but {len(starts)} starts are given")
    return Frames(starts, (grid[0], grid[1], grid[2]), lead)


def _on_grid(kinds: Iterable[tuple[Grid, int]], device: torch.device) -> tuple[Tensor, ...]:
    """For each grid, with its lead, which visual tokens lie on it."""
    tokens, first = [], 0
    for (frames, height, width), lead in kinds:
        size = lead + height * width
        tokens.append(torch.arange(first, first + frames * size, device=device).view(frames, size)[:, lead:].flatten())
        first += frames * size
    return tuple(tokens)
