"""What the vision tower saw: recorded while it runs, and given to the samples whose pictures it encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategy.backbone import Backbone, EncoderSpec
from strategy.kernels.arguments import named_arguments
from strategy.kernels.attention import apply_rotary, received_attention
from strategy.kernels.layer_spec import part
from strategy.kernels.transfers import tensor_on
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.patch import ModelPatch
from strategy.pruning.state import PrefillState


class EncoderStates(NamedTuple):
    """What one call of the tower saw of the visual tokens of all its pictures, T in order, see `EncoderView`.

    attention: [T, heads]. keys: [T, heads, head width]. features: [T, C].
    """

    attention: Tensor
    keys: Tensor
    features: Tensor


def attention_in_pieces(queries: Tensor, keys: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Return the attention [P, L, heads] that tokens receive of those that they share a piece with.

    Args:
        queries: [P, L, heads, head width], or [P, 1, heads, head width] of those that alone count.
        keys: [P, L, heads, head width].
        lengths: Of the pieces, where one sequence holds them all, P = 1; None where each sequence is a piece.
    """
    if lengths is None:
        return received_attention(queries, keys)
    pieces = zip(queries.split(lengths, dim=1), keys.split(lengths, dim=1), strict=True)
    return torch.cat([received_attention(*piece) for piece in pieces], dim=1)


def states_of_visual_tokens(
    attention: Tensor, keys: Tensor, features: Tensor, class_token: bool, merge: Callable[[Tensor], Tensor] | None
) -> EncoderStates:
    """Return what a layer saw of visual tokens, out of what it saw of all its tokens.

    Args:
        attention, keys, features: See `EncoderStates`, [P, L, ...] instead of [T, ...].
        class_token, merge: See `EncoderSpec`.
    """
    seen = [tensor[:, int(class_token) :] for tensor in (attention, keys, features)]
    if merge is not None:
        seen = [merge(tensor.flatten(2)).unflatten(2, tensor.shape[2:]) for tensor in seen]
    return EncoderStates(*(tensor.flatten(0, 1) for tensor in seen))


class _Current(ThreadState):
    """What a thread recorded.

    queries, keys: Of the layer while it runs, [P, 1 or L, C] and [P, L, C], or [L, C] of packed pictures. order: See
    `EncoderSpec`, of the call that runs. calls: Since the last prompts were prefilled. used: Whether prompts have been
    given the calls. apart: Calls inside `record_apart`; None outside.
    """

    queries: Tensor | None = None
    keys: Tensor | None = None
    order: Tensor | None = None
    calls: tuple[EncoderStates, ...] = ()
    used: bool = False
    apart: tuple[EncoderStates, ...] | None = None


class EncoderRecorder:
    """Records one layer of a vision tower, out of the queries and keys that the layer computes anyway.

    Args:
        spec: The tower.
        number: The layer, see `Strategy.encoder_layer`.
        strategy: The name of the strategy that wants it.

    Raises:
        ValueError: The tower has no such layer.
    """

    def __init__(self, spec: EncoderSpec, number: int, strategy: str) -> None:
        depth = len(spec.layers)
        if not -depth <= number < depth:
            raise ValueError(f"{strategy} looks at layer {number} of the vision tower, which has {depth} layers")
        self.spec, self.layer, self.strategy = spec, spec.layers[number], strategy
        self.current = _Current()

    @classmethod
    def of(
        cls, number: int | None, strategy: str, model: nn.Module, backbone: Backbone, bare: bool
    ) -> EncoderRecorder | None:
        """Return a recorder for a strategy's layer; None for a strategy that asks for none.

        Raises:
            ValueError: The strategy asks for one, and there is no tower, or nothing is known of it.
        """
        if number is None:
            return None
        spec = None if bare else backbone.encoder(model)
        if spec is None:
            reason = (
                "a bare decoder has none"
                if bare
                else f"the backbone {backbone.name} describes none of this {type(model).__name__} (Backbone.encoder)"
            )
            raise ValueError(
                f"{strategy} looks at what the vision tower saw, but {reason}: choose a strategy that does not, or "
                "another model"
            )
        return cls(spec, number, strategy)

    def register(self, patch: ModelPatch) -> None:
        """Put the hooks on."""
        patch.handles += [
            part(self.layer, self.spec.query).register_forward_hook(self._keep_query),
            part(self.layer, self.spec.key).register_forward_hook(self._keep_keys),
            self.layer.register_forward_hook(self._keep_layer, with_kwargs=True),
        ]
        if self.spec.order is not None:
            patch.handles.append(self.spec.order[0].register_forward_pre_hook(self._keep_order, with_kwargs=True))

    def generate(self, stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `generate`, without what an earlier call that failed left."""
        self.current.calls = ()
        return stock(*args, **kwargs)

    def record_apart(self, function: Callable[[], Any]) -> tuple[Any, tuple[EncoderStates, ...]]:
        """Return what a function returns, and what is recorded meanwhile, for `add`."""
        self.current.apart = ()
        try:
            output = function()
            return output, self.current.apart
        finally:
            self.current.apart = None

    def add(self, calls: Sequence[EncoderStates]) -> None:
        """Add calls to those for the next prompts."""
        current = self.current
        if calls:
            current.calls, current.used = (*(() if current.used else current.calls), *calls), False

    def assign(self, state: PrefillState) -> None:
        """Give each group of new prompts what the tower saw of its visual tokens.

        Raises:
            ValueError: The tower encoded other pictures than the prompts show.
        """
        kinds = {sample: group.kinds for group in state.groups for sample in group.samples}
        sizes = [[kind.grid[0] * kind.frame_size for kind in kinds[sample]] for sample in range(len(kinds))]
        calls, copies = self._calls_for([sum(own) for own in sizes])
        # The tower takes the pictures of all samples in order, but images and videos apart.
        taken = sorted(
            (kind.tower_call, sample, number)
            for sample in range(0, len(kinds), copies)
            for number, kind in enumerate(kinds[sample])
        )
        places, seen = {}, 0
        for _, sample, number in taken:
            places[sample, number] = range(seen, seen := seen + sizes[sample][number])
        joined = [torch.cat(tensors) for tensors in zip(*calls, strict=True)]
        for group in state.groups:
            first = [sample - sample % copies for sample in group.samples]
            rows = [[at for number in range(len(group.kinds)) for at in places[sample, number]] for sample in first]
            index = tensor_on(joined[0].device, rows, torch.long)
            group.encoder = tuple(tensor[index].to(state.real.device) for tensor in joined)
        self.current.used = True

    def _calls_for(self, counts: Sequence[int]) -> tuple[Sequence[EncoderStates], int]:
        """Return the last calls that encoded samples with so many visual tokens, and how often each sample stands here.

        Samples are repeated for beams, each one in place. Earlier calls may be of prompts that never came.
        """
        calls, wanted = self.current.calls, sum(counts)
        for first in range(len(calls)):
            found = sum(len(call.features) for call in calls[first:])
            copies = wanted // found
            if copies * found == wanted and all(count == counts[at - at % copies] for at, count in enumerate(counts)):
                return calls[first:], copies
        raise ValueError(
            f"{self.strategy} looks at what the vision tower saw: the prompts show {wanted} visual tokens, but the "
            f"tower encoded {sum(len(call.features) for call in calls)}: give prompts and pictures to one call"
        )

    def _keep_order(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.spec.order
        self.current.order = self.spec.order[1](named_arguments(tower.forward, args) | kwargs)

    def _keep_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        queries = output.chunk(3, dim=-1)[0] if self.spec.query == self.spec.key else output
        self.current.queries = queries[:, :1] if self.spec.class_token else queries

    def _keep_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.current.keys = output.chunk(3, dim=-1)[1] if self.spec.query == self.spec.key else output

    def _keep_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current = self.current
        hidden = output[0] if isinstance(output, tuple) else output
        queries, keys, current.queries, current.keys = current.queries, current.keys, None, None
        order, current.order = current.order, None
        assert queries is not None
        assert keys is not None
        with torch.no_grad():
            states = self._states(queries, keys, hidden, kwargs, order)
        if current.apart is None:
            self.add([states])
        else:
            current.apart = (*current.apart, states)

    def _states(
        self, queries: Tensor, keys: Tensor, hidden: Tensor, kwargs: dict[str, Any], order: Tensor | None
    ) -> EncoderStates:
        """Return what a layer saw, given its projections and output, [P, L, C] or packed [L, C], and its arguments."""
        spec = self.spec
        if spec.ends:
            queries, keys, hidden = queries[None], keys[None], hidden[None]
        queries, keys = (tensor.unflatten(-1, (spec.heads, -1)) for tensor in (queries, keys))
        turned = keys
        if spec.rotary:
            cos, sin = (table.float()[None] for table in kwargs[spec.rotary])
            queries, turned = (
                apply_rotary(each.float().transpose(1, 2), cos, sin).transpose(1, 2) for each in (queries, keys)
            )
        attention = attention_in_pieces(queries, turned, kwargs[spec.ends].diff().tolist() if spec.ends else None)
        seen = states_of_visual_tokens(attention, keys, hidden, spec.class_token, spec.merge)
        return seen if order is None else EncoderStates(*(tensor[order.to(tensor.device)] for tensor in seen))
