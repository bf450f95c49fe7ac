"""The attention of CLIP's vision towers, in a fraction of the time that transformers 4.37 takes for it."""

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def clip_forward(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    causal_attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what `CLIPAttention` of transformers 4.37 does, which computes with matrices of all pairs of tokens.

    In large batches, softmax over these matrices takes half of a tower's time on a GPU.

    Args:
        attention: The module.
        hidden_states: [B, L, C].
        attention_mask, causal_attention_mask, output_attentions: If one is given, the stock forward call computes.
    """
    if attention_mask is not None or causal_attention_mask is not None or output_attentions:
        stock = type(attention).forward
        return stock(attention, hidden_states, attention_mask, causal_attention_mask, output_attentions)
    query, key, value = (
        project(hidden_states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    seen = scaled_dot_product_attention(query, key, value, scale=attention.scale)
    return attention.out_proj(seen.transpose(1, 2).flatten(2)), None
