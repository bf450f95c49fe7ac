"""What a decoder layer consists of and how it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: where its modules are, and the facts that its weights do not hold.

    A backbone gives it, and whoever computes with a layer's weights reads it: attention rows, fused layers, costs and
    tensor parallelism. The paths of modules are relative to the layer. A path is None where the layer has no such
    module.

    Attributes:
        head_width: Width of an attention head.
        scale: Factor of the attention logits.
        epsilon: Epsilon of the norms.
        activation: The function between gate and down projection; None where there is no gated MLP.
        attention: "full" where a token sees all tokens before it; "window" where it sees the last `window` of them;
            any other word names an attention without rows and keys, such as "linear".
        window: How many tokens a token sees, itself included; None for all.
        norm: "rms" for weight * x / rms(x), the root mean square in float32; any other word names another norm.
        rotary: "half" where the first half of a head's width rotates with the second; any other word names another
            rotation.
        query, key, value, output: Projections of the attention.
        query_norm, key_norm: Norms of each head of the queries and keys.
        gate, up, down: Projections of the gated MLP.
        input_norm, post_attention_norm: Norms before the attention and before the MLP.
    """

    head_width: int
    scale: float
    epsilon: float
    activation: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    attention: str = "full"
    window: int | None = None
    norm: str = "rms"
    rotary: str = "half"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str | None = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"

    @property
    def packed(self) -> tuple[tuple[str | None, ...], ...]:
        """Paths of the projections that read the same input, for each such input."""
        return (self.query, self.key, self.value), (self.gate, self.up)


def part(layer: nn.Module, path: str) -> Any:
    """Return the module of a layer at a path of its `LayerSpec`."""
    return layer.get_submodule(path)


def llama_spec(layer: Any) -> LayerSpec:
    """Describe a layer with the modules of transformers' Llama, as most of its decoders have them.

    Query and key norms, a window and experts in place of the MLP are recognised.
    """
    attention, mlp = layer.self_attn, layer.mlp
    window = getattr(attention, "sliding_window", None)
    gated = all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    return LayerSpec(
        head_width=attention.head_dim,
        scale=getattr(attention, "scaling", attention.head_dim**-0.5),
        epsilon=layer.input_layernorm.variance_epsilon,
        activation=mlp.act_fn if gated else None,
        attention="full" if window is None else "window",
        window=window,
        query_norm="self_attn.q_norm" if hasattr(attention, "q_norm") else None,
        key_norm="self_attn.k_norm" if hasattr(attention, "k_norm") else None,
        gate="mlp.gate_proj" if gated else None,
        up="mlp.up_proj" if gated else None,
        down="mlp.down_proj" if gated else None,
    )
