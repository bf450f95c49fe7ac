"""What the vision tower saw of each picture, kept as long as vLLM keeps what the tower made of it."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.model_executor.layers.attention import MMEncoderAttention

from strategy.kernels.selection import mean_of_neighbours
from strategy.pruning.encoder import EncoderStates, attention_in_pieces, states_of_visual_tokens
from strategy.pruning.state import PrefillState
from vllm_vtr.families import Tower


class TowerRecorder:
    """Records one layer of a vision tower, out of the queries and keys that the layer computes anyway.

    Args:
        tower: The tower.
        number: The layer, see `Strategy.encoder_layer`.
        strategy: The name of the strategy that wants it.
        model: The model.

    Attributes:
        calls: What the layer saw in the present call for embeddings.
        states: What it saw of a picture or video, by the embeddings that came out.

    Raises:
        ValueError: The tower has no such layer, or vLLM does not run it.
    """

    def __init__(self, tower: Tower, number: int, strategy: str, model: nn.Module) -> None:
        depth, layers = tower.depth(model.config), [*model.get_submodule(tower.layers).children()]
        if not -depth <= number < depth or number % depth >= len(layers):
            raise ValueError(
                f"vtr: {strategy} looks at layer {number} of the vision tower, which has {depth}, and {len(layers)} run"
            )
        layer = layers[number % depth]
        [attention] = [module for module in layer.modules() if isinstance(module, MMEncoderAttention)]
        self.class_token, count, self.heads = tower.class_token, tower.merged(model.config), attention.num_heads
        self.merge = partial(mean_of_neighbours, count=count) if count > 1 else None
        self.keys: Tensor | None = None
        self.attention: Tensor | None = None
        self.calls: list[EncoderStates] = []
        self.states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        layer.get_submodule(tower.projection).register_forward_hook(self._keep_keys)
        attention.register_forward_pre_hook(self._keep_attention, with_kwargs=True)
        # Classes that vLLM may compile call `forward` themselves, without hooks.
        layer.forward = self._kept(layer.forward)

    def record(self, embed: Callable[[], Any]) -> list[Tensor]:
        """Return the embeddings of pictures or videos, and keep what the tower sees of them."""
        self.calls.clear()
        embeddings = list(embed())
        sizes = [len(each) for each in embeddings]
        for each, *states in zip(
            embeddings, *(torch.cat(seen).split(sizes) for seen in zip(*self.calls, strict=True)), strict=True
        ):
            self.states[each] = EncoderStates(*states)
        self.calls.clear()
        return embeddings

    def assign(self, pruned: PrefillState, shown: Sequence[Sequence[Tensor]]) -> None:
        """Give each group of prompts what the tower saw, given the embeddings that each prompt shows, in order."""
        for group in pruned.groups:
            rows = [
                [torch.cat(seen) for seen in zip(*(self.states[each] for each in shown[sample]), strict=True)]
                for sample in group.samples
            ]
            group.encoder = tuple(torch.stack(tensors) for tensors in zip(*rows, strict=True))

    def _keep_keys(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.keys = output[0].chunk(3, dim=-1)[1]

    def _keep_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key = (
            (kwargs[name] if name in kwargs else args[at]).flatten(2).unflatten(-1, (self.heads, -1))
            for at, name in enumerate(("query", "key"))
        )
        ends = kwargs.get("cu_seqlens")
        lengths = None if ends is None else ends.diff().tolist()
        self.attention = attention_in_pieces(query[:, :1] if self.class_token else query, key, lengths)

    def _kept(self, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the layer's `forward`, which keeps what it saw."""

        @wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            output = stock(*args, **kwargs)
            assert self.keys is not None
            assert self.attention is not None
            pieces = self.attention.shape[:2]
            seen = self.attention, self.keys.reshape(*pieces, self.heads, -1), output.reshape(*pieces, -1)
            self.calls.append(states_of_visual_tokens(*seen, self.class_token, self.merge))
            self.keys = self.attention = None
            return output

        return forward
