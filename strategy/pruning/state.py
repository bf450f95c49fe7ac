"""The state of one pruned forward call: which tokens are left, and where they are."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from strategy.backbone import Layout
from strategy.kernels.attention import gather_rows
from strategy.kernels.selection import keep_chosen
from strategy.kernels.transfers import tensor_on
from strategy.metrics.record import Stage
from strategy.plan import Grid
from strategy.pruning.layout import SpanKind, on_grid, resolve_layout
from strategy.pruning.narrowing import LayerKwargs


@dataclass
class SampleGroup:
    """Samples of a batch with the same grids, so that one tensor holds them all.

    Attributes:
        samples: Their numbers in the batch.
        batch_index: Where they stand in the tensors of this forward call, on the device.
        num_visual: Visual tokens of each sample before the first prune.
        kinds: Of their spans, in order.
        on_grid: See `View`.
        remaining: [G, R], their tokens that are left, as indices of the whole prompt.
        visual, text: Positions in `remaining` of the visual tokens and of the other tokens.
        original_index: [G, N], the visual tokens that are left, in the numbering of the unpruned ones.
        question_mask: [G, R], which of the last R tokens of `text` are real and stand behind the visual tokens.
        memo: See `View`.
        encoder: Attention [G, N, heads], keys [G, N, heads, head width] and features [G, N, C] of the unpruned visual
            tokens in the vision tower, for strategies that ask for them; otherwise empty.
        joint: The same visual tokens [G, N, D] and the questions [G, D] in a joint space, see `JointView`; likewise.
    """

    samples: list[int]
    batch_index: Tensor
    num_visual: int
    kinds: tuple[SpanKind, ...]
    on_grid: tuple[Tensor, ...]
    remaining: Tensor
    visual: Tensor
    text: Tensor
    original_index: Tensor
    question_mask: Tensor
    memo: dict[str, Tensor] = field(default_factory=dict)
    encoder: tuple[Tensor, ...] = ()
    joint: tuple[Tensor, ...] = ()

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Return the grids of the spans."""
        return tuple(kind.grid for kind in self.kinds)

    def keep(self, chosen: Tensor) -> Tensor:
        """Drop the visual tokens not in `chosen` [G, N'], in order; returns the positions that stay in `remaining`."""
        stay, self.remaining, self.original_index, self.visual, self.text = keep_chosen(
            self.remaining, self.original_index, self.visual, self.text, chosen
        )
        return stay


class PrunedPrompt(NamedTuple):
    """What a pruned cache does not show of its prompt.

    length: Tokens of the whole prompt. position: [B, 1], the position id of the token that follows the prompt. real:
    [B, L], False at padding among the tokens that are left.
    """

    length: int
    position: Tensor
    real: Tensor

    def fit(self, batch: int, device: torch.device) -> "PrunedPrompt":
        """Return the same on a device, for a cache whose samples were repeated, each one in place, up to `batch`."""
        copies = batch // len(self.real)
        if copies == 1 and self.real.device == device:
            return self
        return PrunedPrompt(self.length, *(tensor.to(device).repeat_interleave(copies, 0) for tensor in self[1:]))


@dataclass
class PrefillState:
    """The state of one forward call over prompts with visual tokens.

    Attributes:
        groups: The samples, by their grids.
        real: [B, S], False at the prompts' own padding.
        last: [B, 1], each prompt's last token.
        position: [B, 1], the position id of the token that will follow the prompt.
        gather_indices: For each prune, the positions [B, L], in the sequence before the prune, of what is left.
        index: [B, L], what is left, as indices of the whole prompt; None while everything is left.
        padding: [B, L], True where a sample that lost more tokens than another is padded on the left; None if nowhere.
        layer_kwargs: Narrows the arguments of layers to what is left; None while everything is left.
        reference: The hidden states [B, S, C] that entered the plan's reference layer.
        added: See `Backbone.added_features`.
        prior: See `View`, [B, heads, S].
        projects_keys: Whether keys must be projected again, since there is no cache.
        finite: Whether no score was NaN, and the features of the first stage and the output of the last layer were
            finite; a tensor once there were any.
        selected: Whether all selections named different tokens in order; a tensor once there were any.
        stages: The prunes so far.
        lengths: Of the sequence after each prune.
    """

    groups: list[SampleGroup]
    real: Tensor
    last: Tensor
    position: Tensor
    gather_indices: list[Tensor] = field(default_factory=list)
    index: Tensor | None = None
    padding: Tensor | None = None
    layer_kwargs: LayerKwargs | None = None
    reference: Tensor | None = None
    added: list[Tensor] = field(default_factory=list)
    prior: Tensor | None = None
    projects_keys: bool = False
    finite: Tensor | bool = True
    selected: Tensor | bool = True
    stages: list[Stage] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def from_layout(
        cls, layout: Layout, tokens: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> "PrefillState":
        """Begin with prompts and their layout.

        Args:
            layout: The spans of each sample.
            tokens: The prompts [B, S, ...].
            mask: Their padding, [B, S], if they have any.
            positions: Their position ids, [B or 1, S] or several kinds of them, [..., B or 1, S]; counted from 0 if
                None.
        """
        (batch, length), device = tokens.shape[:2], tokens.device
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if mask is not None and mask.dim() == 2:
            real = mask.bool()
        alike: dict[tuple[SpanKind, ...], list[tuple[int, list[int]]]] = {}
        for sample, spans in enumerate(resolve_layout(layout, batch, length)):
            visual = [at for span in spans for start in span.starts for at in range(start, start + span.frame_size)]
            alike.setdefault(tuple(span.kind for span in spans), []).append((sample, visual))
        groups = [_group(kinds, members, real) for kinds, members in alike.items()]
        last = (real * torch.arange(length, device=device)).amax(dim=1, keepdim=True)
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        # The first kind may merely count tokens; a text token's position is the same in all kinds that rotate.
        position = positions.reshape(-1, *positions.shape[-2:])[-1].take_along_dim(last, 1) + 1
        return cls(groups, real, last, position)

    def to_device(self, device: torch.device) -> None:
        """Move the state to the device of the layers to come; does nothing on the same device."""
        if device == self.real.device:
            return
        for holder in (self, *self.groups):
            for name, value in vars(holder).items():
                if isinstance(value, Tensor):
                    setattr(holder, name, value.to(device))
        for group in self.groups:
            group.on_grid = tuple(tensor.to(device) for tensor in group.on_grid)
            group.memo = {name: value.to(device) for name, value in group.memo.items()}
            group.encoder = tuple(tensor.to(device) for tensor in group.encoder)
            group.joint = tuple(tensor.to(device) for tensor in group.joint)
        self.gather_indices = [index.to(device) for index in self.gather_indices]

    def select(self, group: SampleGroup, tensor: Tensor) -> Tensor:
        """Return the group's samples of a tensor [B or 1, ...]."""
        return tensor if len(self.groups) == 1 or len(tensor) == 1 else tensor[group.batch_index]

    def prune(self, stays: list[Tensor], hidden: Tensor) -> Tensor:
        """Keep what stays of hidden states [B, L, C], once each group has called `SampleGroup.keep`.

        Args:
            stays: For each group the positions [G, R] that stay.
            hidden: The hidden states.
        """
        length = max(stay.shape[1] for stay in stays)
        take, self.index = (
            self._assemble(parts, length) for parts in (stays, [group.remaining for group in self.groups])
        )
        self.gather_indices.append(take)
        self.lengths.append(length)
        self.padding = None
        if any(stay.shape[1] < length for stay in stays):
            self.padding = self._assemble([torch.ones_like(stay) for stay in stays], length) == 0
        self.layer_kwargs = LayerKwargs(self.index, self.padding)
        return gather_rows(hidden, take)

    def _assemble(self, parts: Iterable[Tensor], length: int) -> Tensor:
        if len(self.groups) == 1:
            return next(iter(parts))
        rows: dict[int, Tensor] = {}
        for group, part in zip(self.groups, parts, strict=True):
            rows |= zip(group.samples, F.pad(part, (length - part.shape[1], 0)), strict=True)
        return torch.stack([rows[sample] for sample in range(len(rows))])

    def kept(self) -> tuple[Tensor, ...]:
        """Return the visual tokens each sample still has, in the numbering of its unpruned ones."""
        rows = {s: n for g in self.groups for s, n in zip(g.samples, g.original_index, strict=True)}
        return tuple(rows[sample] for sample in sorted(rows))

    def length_after(self, prunes: int) -> int:
        """Return how long the sequence is after so many prunes."""
        return self.lengths[prunes - 1] if prunes else self.real.shape[1]

    def prunes_before(self, layer: int) -> int:
        """Return how many prunes that dropped something came before a layer ran."""
        return sum(stage.layer <= layer for stage in self.stages if stage.after < stage.before)

    def cache_positions(self, prunes: int) -> Tensor | None:
        """Return the positions [B, L], in the cache of a layer with so many prunes before it, of what is left."""
        positions: Tensor | None = None
        for take in reversed(self.gather_indices[prunes:]):
            positions = take if positions is None else take.gather(1, positions)
        return positions

    def pruned_prompt(self) -> PrunedPrompt | None:
        """Return what the cache will not show of this prompt; None if nothing was pruned."""
        if self.index is None:
            return None
        real = self.real.gather(1, self.index)
        return PrunedPrompt(self.real.shape[1], self.position, real if self.padding is None else real & ~self.padding)

    def last_positions(self, length: int) -> Tensor:
        """Return the positions [B, 1] of the prompts' last tokens when so many tokens are left."""
        return self.last + (length - self.real.shape[1])

    def remaining_rows(self, tensor: Tensor) -> Tensor:
        """Return what is left of a tensor [B, S, C] over the whole prompt."""
        return tensor if self.index is None else gather_rows(tensor, self.index.to(tensor.device))


def _group(kinds: tuple[SpanKind, ...], members: list[tuple[int, list[int]]], real: Tensor) -> SampleGroup:
    """Gather samples with the same grids, each given by its number and its visual tokens."""
    length, device = real.shape[1], real.device
    visual = [own for _, own in members]
    text = [sorted(set(range(length)).difference(own)) for own in visual]
    samples = [sample for sample, _ in members]
    batch_index = tensor_on(device, samples)
    ends = [max(own, default=-1) for own in visual]
    tail = tensor_on(device, [others[min(ends) - length + 1 :] for others in text])
    question = real[batch_index].gather(1, tail) & (tail > tensor_on(device, ends)[:, None])
    # Where only padding follows a picture, its last token stands for the question.
    question[:, -1] |= ~question.any(1)
    return SampleGroup(
        samples=samples,
        batch_index=batch_index,
        num_visual=len(visual[0]),
        kinds=kinds,
        on_grid=on_grid(kinds, device),
        remaining=torch.arange(length, device=device).expand(len(members), -1),
        visual=tensor_on(device, visual, torch.long),
        text=tensor_on(device, text, torch.long),
        original_index=torch.arange(len(visual[0]), device=device).expand(len(members), -1),
        question_mask=question,
    )
