"""What a decoder layer consists of and how it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# The attention of a layer that caches other keys than its description says.
MISDESCRIBED = "misdescribed"


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
            any other word names an attention without rows and keys, such as "linear", whose layers keep a state of
            fixed size, take padding as a mask [B, L], and cannot forget a token.
        window: How many tokens a token sees, itself included; None for all.
        norm: "rms" for weight * x / rms(x), the root mean square in float32; any other word names another norm.
        rotary: "half" where the first half of a head's width rotates with the second, or of the part of it that the
            rotary tables cover; any other word names another rotation.
        query_gate: Whether a gate as wide as a head follows each head's query in the output of the query projection.
        query, key, value, output: Projections of the attention.
        query_norm, key_norm: Norms of each head of the queries and keys.
        gate, up, down: Projections of the gated MLP.
        input_norm: The norm in front of the attention's projections.
        post_attention_norm: The norm in front of the MLP's, whatever the layer calls it. Llama's name for it is
            post_attention_layernorm; Gemma-2's module of that name is another one, behind the attention.
    """

    head_width: int
    scale: float
    epsilon: float
    activation: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    attention: str = "full"
    window: int | None = None
    norm: str = "rms"
    rotary: str = "half"
    query_gate: bool = False
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    output: str | None = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str | None = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    post_attention_norm: str | None = "post_attention_layernorm"

    @property
    def has_rows(self) -> bool:
        """Return whether attention rows can be computed from the layer's projections."""
        return self.attention in ("full", "window") and self.rotary == "half"

    @property
    def linear(self) -> bool:
        """Return whether the layer keeps a state of fixed size in place of keys and values."""
        return self.output is None

    @property
    def paths(self) -> tuple[str | None, ...]:
        """Return the paths of all modules, None for those that the layer does not have."""
        norms = (self.input_norm, self.post_attention_norm, self.query_norm, self.key_norm)
        return (*norms, self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    @property
    def packed(self) -> tuple[tuple[str | None, ...], ...]:
        """Paths of the projections that read the same input, for each such input."""
        return (self.query, self.key, self.value), (self.gate, self.up)


def part(layer: nn.Module, path: str | None) -> Any:
    """Return the module of a layer at a path of its `LayerSpec`, of those that the layer has."""
    assert path is not None
    return layer.get_submodule(path)


def norm_epsilon(norm: Any) -> Any:
    """Return the epsilon of a norm; None if it has none under a known name."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def linear_spec(layer: Any) -> LayerSpec:
    """Describe a layer of linear attention between two norms with the names of Llama's."""
    nothing = dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"))
    epsilon = norm_epsilon(layer.input_layernorm)
    return LayerSpec(head_width=0, scale=0.0, epsilon=epsilon, attention="linear", **nothing)  # type: ignore[arg-type]


def llama_spec(layer: Any) -> LayerSpec:
    """Describe a layer with the modules of transformers' Llama, as most of its decoders have them.

    Query and key norms, a window and experts in place of the MLP are recognised. A norm that is not called an RMS norm
    is described by the name of its class.

    Raises:
        ValueError: The layer has other modules.
    """
    parts: list[Any] = [getattr(layer, name, None) for name in ("self_attn", "mlp", "input_layernorm")]
    attention, mlp, norm = parts
    wanted = ("head_dim", "q_proj", "k_proj", "v_proj", "o_proj")
    missing = [f"self_attn.{name}" for name in wanted if not hasattr(attention, name)]
    missing += [] if norm_epsilon(norm) is not None else ["input_layernorm with an epsilon"]
    if missing:
        raise ValueError(
            f"a {type(layer).__name__} has no {', '.join(missing)}, so its modules are not those of Llama: let "
            "layer_spec of its Backbone return strategy.LayerSpec(head_width=, scale=, epsilon=, query=, key=, value=, "
            "output=, input_norm=, ...) with the paths of its own modules"
        )
    window = getattr(attention, "sliding_window", None)
    gated = all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    kind = type(norm).__name__
    return LayerSpec(
        head_width=attention.head_dim,
        scale=getattr(attention, "scaling", attention.head_dim**-0.5),
        epsilon=norm_epsilon(norm),
        activation=mlp.act_fn if gated else None,
        attention="full" if window is None else "window",
        window=window,
        norm="rms" if "rms" in kind.lower() else kind,
        query_norm="self_attn.q_norm" if hasattr(attention, "q_norm") else None,
        key_norm="self_attn.k_norm" if hasattr(attention, "k_norm") else None,
        gate="mlp.gate_proj" if gated else None,
        up="mlp.up_proj" if gated else None,
        down="mlp.down_proj" if gated else None,
        post_attention_norm="post_attention_layernorm" if hasattr(layer, "post_attention_layernorm") else None,
    )
