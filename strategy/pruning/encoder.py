"""What the vision tower saw: recorded while it runs, and given to the samples whose pictures it encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategy.backbone import Backbone, EncoderSpec
from strategy.kernels.layer_spec import part
from strategy.metrics.thread_state import ThreadState
from strategy.pruning.patch import ModelPatch
from strategy.pruning.state import PrefillState


class EncoderStates(NamedTuple):
    """What one call of the tower saw of the patches of all its pictures, T in order.

    attention: [T, heads], what the class token of their picture pays them. keys: [T, heads, head width]. features: [T,
    C], the output of the layer.
    """

    attention: Tensor
    keys: Tensor
    features: Tensor


class _Current(ThreadState):
    """What a thread recorded.

    queries, keys: Of the layer while it runs, [P, 1, C] and [P, L, C]. calls: Since the last prompts were prefilled.
    used: Whether prompts have been given the calls. apart: Calls inside `record_apart`; None outside.
    """

    queries: Tensor | None = None
    keys: Tensor | None = None
    calls: tuple[EncoderStates, ...] = ()
    used: bool = False
    apart: tuple[EncoderStates, ...] | None = None


class EncoderRecorder:
    """Records one layer of a vision tower, out of what the layer computes anyway: a row of attention, and its keys.

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
            self.layer.register_forward_hook(self._keep_layer),
        ]

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
        counts = [0] * len(state.real)
        for group in state.groups:
            for sample in group.samples:
                counts[sample] = group.num_visual
        calls, copies = self._calls_for(counts)
        starts, seen = [], 0
        for count in counts[::copies]:
            starts += [seen] * copies
            seen += count
        joined = [torch.cat(tensors) for tensors in zip(*calls, strict=True)]
        for group in state.groups:
            first = torch.tensor([[starts[sample]] for sample in group.samples])
            at = (first + torch.arange(group.num_visual)).to(joined[0].device)
            group.encoder = tuple(tensor[at].to(state.real.device) for tensor in joined)
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

    def _keep_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.current.queries = output[:, :1]

    def _keep_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.current.keys = output

    def _keep_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self.current
        hidden = output[0] if isinstance(output, tuple) else output
        queries, keys, current.queries, current.keys = current.queries, current.keys, None, None
        assert queries is not None
        assert keys is not None
        with torch.no_grad():
            query, key = (tensor.unflatten(-1, (self.spec.heads, -1)) for tensor in (queries, keys))
            logits = torch.einsum("prhd,plhd->plh", query.float(), key.float()) * key.shape[-1] ** -0.5
            attention = logits.softmax(dim=1)
            states = EncoderStates(*(tensor[:, 1:].flatten(0, 1) for tensor in (attention, key, hidden)))
        if current.apart is None:
            self.add([states])
        else:
            current.apart = (*current.apart, states)
