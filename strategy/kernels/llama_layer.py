"""A Llama-shaped decoder layer as functions of tensors, which torch.compile fuses and CUDA graphs capture.

The functions give what the stock layers give, up to rounding. Projections that read the same input are one matrix
product.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from strategy.kernels.attention import apply_rotary, gather_rows
from strategy.kernels.compile import compilable
from strategy.kernels.decode_attention import decode_attention
from strategy.kernels.layer_facts import TP_GROUP_ATTR, is_zero_sharded, tp_group_of
from strategy.kernels.layer_spec import LayerSpec, part
from strategy.kernels.packed_attention import packed_causal_attention

SHORT_PROMPT = 1024  # tokens of a prompt, or of a batch of prompts
# cuDNN's attention is faster for long prompts, but it starts with a memset and a pause.
SDPA_PRIORITY = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class LayerShape(NamedTuple):
    """The numbers of a layer: query and key heads, their width, epsilon of its norms, scale of its logits.

    group is the name of the process group that the layer is split over; each rank has a share of the heads.
    """

    heads: int
    key_heads: int
    width: int
    epsilon: float
    scale: float
    group: str | None = None


class LayerWeights(NamedTuple):
    """The tensors of a layer, [out, in] for those that multiply."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    post_attention_norm: Tensor
    gate_up: Tensor
    down: Tensor


def fusion_blocker(layers: nn.ModuleList, specs: Sequence[LayerSpec]) -> str | None:
    """Return why these functions cannot be what a decoder's layers are, by their descriptions; None if they can.

    A window is no reason, since it hides nothing from a prompt and an answer that fit into the window; whoever runs the
    functions checks the lengths. Whether the descriptions are right is for `layer_check` to try.
    """
    return unreachable_weights(layers) or next(chain.from_iterable(map(_layer_blockers, layers, specs)), None)


def unreachable_weights(layers: nn.ModuleList) -> str | None:
    """Return why functions cannot compute with a decoder's weights; None if they can."""
    if is_zero_sharded(layers):
        return "a decoder whose weights are sharded (ZeRO stage 3)"
    if len({(p.device, p.dtype) for p in layers.parameters()}) > 1 or next(layers.parameters()).is_meta:
        return "a decoder with weights of several types or devices, or none in memory"
    return None


def lies_apart(model: nn.Module) -> str | None:
    """Return why programs cannot run a whole model, such as its vision tower and its layers; None if they can."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "a model whose parts lie on several devices"
    return None


def _layer_blockers(layer: nn.Module, spec: LayerSpec) -> Iterator[str]:
    """Yield what the description of a layer has that these functions cannot compute."""
    name, modules = type(layer).__name__, dict(layer.named_modules())
    if spec.attention not in ("full", "window"):
        yield f"a {name} with {spec.attention} attention"
    if spec.query_gate:
        yield f"a {name} with a gate beside its queries"
    for kind, given, known in (("norm", spec.norm, "rms"), ("rotary embedding", spec.rotary, "half")):
        if given != known:
            yield f"a {name} with another {kind} ({given})"
    if spec.post_attention_norm is None:
        yield f"a {name} without a norm in front of its MLP"
    for path in spec.paths:
        if path is not None and path not in modules:
            yield f"a {name} without {path}, which its description names"
    unbiased = (spec.gate, spec.up, spec.output, spec.down)
    paths = (spec.query, spec.key, spec.value, *unbiased)
    linears = [None if path is None else modules[path] for path in paths]
    if any(type(linear) is not nn.Linear and not hasattr(linear, TP_GROUP_ATTR) for linear in linears):
        yield f"a {name} without plain linear projections (experts, adapters, quantised)"
    if any(modules[path].bias is not None for path in unbiased if path is not None):
        yield f"a {name} with biases behind its attention"
    for parameter, _ in layer.named_parameters():
        if parameter.rpartition(".")[0] not in spec.paths:
            yield f"a {name} with a parameter that its description does not name ({parameter})"
    values = torch.linspace(-2, 2, 5, device=next(layer.parameters()).device)
    activation = getattr(spec.activation, "forward", spec.activation)  # hooks on a module do not see this call
    if activation is None or not torch.equal(activation(values), F.silu(values)):
        yield f"an activation other than SiLU ({type(spec.activation).__name__})"


def layer_shape(layer: nn.Module, spec: LayerSpec) -> LayerShape:
    """Return the numbers of a layer."""
    group = tp_group_of([layer])
    heads, key_heads = (len(part(layer, path).weight) // spec.head_width for path in (spec.query, spec.key))
    name = str(group.group_name) if group else None
    return LayerShape(heads, key_heads, spec.head_width, spec.epsilon, spec.scale, name)


@torch.no_grad()
def pack_projections(layers: nn.ModuleList, specs: Sequence[LayerSpec]) -> list[LayerWeights]:
    """Lay the projections of the same input behind each other in memory, and return each layer's tensors.

    Parameters stay the same objects with the same values; their memory is shared. `unpack_projections` undoes it.
    """
    weights = []
    for layer, spec in zip(layers, specs, strict=True):
        weights.append(layer_weights(layer, spec, share=True))
        # Otherwise torch cuts the next layer's short tensors out of the blocks that this layer's long ones left, and
        # the rest of each block is too short for anything: 3 GB of the 5 that Qwen2-VL-72B leaves on each of two GPUs
        # of 80 GB.
        torch.cuda.empty_cache()
    return weights


def layer_weights(layer: nn.Module, spec: LayerSpec, share: bool = False) -> LayerWeights:
    """Return a layer's tensors; its projections are copies, or share their memory with these copies from now on."""
    packed: list[Tensor] = []
    for paths in spec.packed:
        linears = [part(layer, path) for path in paths if path is not None]
        for kind in ("weight", "bias"):
            own = [getattr(linear, kind) for linear in linears]
            if own[0] is None:
                continue
            whole = torch.cat([parameter.data for parameter in own])
            if share:
                for parameter, piece in zip(own, whole.split([len(parameter) for parameter in own]), strict=True):
                    parameter.data = piece
            packed.append(whole)
    qkv, *bias, gate_up = packed

    def weight(path: str | None) -> Any:
        return None if path is None else part(layer, path).weight.data

    return LayerWeights(
        input_norm=weight(spec.input_norm),
        qkv=qkv,
        qkv_bias=bias[0] if bias else None,
        q_norm=weight(spec.query_norm),
        k_norm=weight(spec.key_norm),
        out=weight(spec.output),
        post_attention_norm=weight(spec.post_attention_norm),
        gate_up=gate_up,
        down=weight(spec.down),
    )


@torch.no_grad()
def unpack_projections(layers: nn.ModuleList, specs: Sequence[LayerSpec], weights: list[LayerWeights]) -> None:
    """Give each projection memory of its own again, and empty the list that `pack_projections` returned."""
    # The list is emptied first, so that unpacking needs the memory of one further layer instead of all; and in place,
    # since others may hold the list, such as the frames of a call that has failed.
    weights.clear()
    for layer, spec in zip(layers, specs, strict=True):
        for path in (path for paths in spec.packed for path in paths if path is not None):
            for parameter in part(layer, path).parameters():
                if parameter.untyped_storage().nbytes() > parameter.nbytes:
                    parameter.data = parameter.data.clone()


@compilable
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square of the last dimension, in float32, and multiply by a weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _heads(x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights, s: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values, [B, heads, L, width], of hidden states [B, L, C]."""
    mixed = F.linear(rms_norm(x, w.input_norm, s.epsilon), w.qkv, w.qkv_bias).unflatten(-1, (-1, s.width))
    q, k, v = mixed.split((s.heads, s.key_heads, s.key_heads), dim=2)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, s.epsilon), rms_norm(k, w.k_norm, s.epsilon)
    q, k = apply_rotary(q.transpose(1, 2), cos, sin), apply_rotary(k.transpose(1, 2), cos, sin)
    v = v.transpose(1, 2)
    # A copy takes time, but a view would keep the queries and keys in memory beside the values.
    return q, k, v if x.shape[0] * x.shape[1] <= SHORT_PROMPT else v.contiguous()


def _all_reduce(share: Tensor, s: LayerShape) -> Tensor:
    """Return the sum over all ranks of a split layer; for a layer that is not split, `share`."""
    if s.group is None:
        return share
    # torch.compile knows these operations; it would not trace calls of torch.distributed with a group.
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(share, "sum", s.group))


def _after_attention(x: Tensor, attended: Tensor, w: LayerWeights, s: LayerShape) -> Tensor:
    """Compute what follows the attention [B, heads, L, width] in a layer with input x [B, L, C]."""
    x = x + _all_reduce(F.linear(attended.transpose(1, 2).flatten(2), w.out), s)
    gate, up = F.linear(rms_norm(x, w.post_attention_norm, s.epsilon), w.gate_up).chunk(2, dim=-1)
    return x + _all_reduce(F.linear(F.silu(gate) * up, w.down), s)


@compilable
def attention_probs(q: Tensor, keys: Tensor, at: Tensor, s: LayerShape) -> Tensor:
    """Compute the attention, float32 [B, heads, R, L], that the tokens at `at` [B, R] pay all tokens before them.

    Args:
        q: A layer's queries [B, heads, L, width], as `prefill` returns them.
        keys: A layer's keys [B, key heads, L, width], as `prefill` returns them.
        at: Sequence indices of the tokens.
        s: The layer's numbers.
    """
    picked = gather_rows(q.transpose(1, 2), at).transpose(1, 2).float().unflatten(1, (s.key_heads, -1))
    if at.shape[1] == 1 and torch.compiler.is_compiling():
        # A sum of products is fused with what follows, which a matrix product is not.
        logits = (picked * keys.float()[:, :, None]).sum(-1)[..., None, :]
    else:
        logits = torch.einsum("bkgrd,bkld->bkgrl", picked, keys.float())
    seen = torch.arange(keys.shape[2], device=keys.device) <= at[:, :, None]
    logits = (logits.flatten(1, 2) * s.scale).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    return logits.softmax(dim=-1)


@compilable
def write_cache(keys: Tensor, values: Tensor, from_keys: Tensor, from_values: Tensor, positions: Tensor) -> None:
    """Copy the tokens at `positions` [B, L] of keys and values [B, key heads, L', width] to the start of a cache's."""
    # Not `take_along_dim`, which torch compiles anew for each length.
    index = positions[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    for slots, given in ((keys, from_keys), (values, from_values)):
        slots[:, :, : positions.shape[1]] = given.gather(2, index)


@compilable
def write_cache_packed(keys: Tensor, values: Tensor, from_keys: Tensor, from_values: Tensor, index: Tensor) -> None:
    """Copy tokens at `index` [B, L] of packed keys and values [1, key heads, T, width] to the start of a cache's."""
    for slots, given in ((keys, from_keys), (values, from_values)):
        slots[:, :, : index.shape[1]] = given[0][:, index].transpose(0, 1)


@compilable
def prefill(
    x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights, s: LayerShape, ends: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a layer over prompts [B, L, C], whose padding, if any, is at their end.

    Args:
        x: Hidden states.
        cos: Cosines [B or 1, L, width] of the rotary embedding.
        sin: Sines of the same shape.
        w: The layer's tensors.
        s: The layer's numbers.
        ends: Of prompts in one sequence, B = 1: where they begin and the last one ends, integers on the CPU.

    Returns:
        The output [B, L, C], and queries, keys and values [B, heads or key heads, L, width].
    """
    q, k, v = _heads(x, cos, sin, w, s)
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=s.scale, enable_gqa=s.heads != s.key_heads)
    if ends is not None:
        packed = [each[0].transpose(0, 1) for each in (q, k, v)]
        attended = packed_causal_attention(*packed, ends, s.scale).transpose(0, 1)[None]
    elif torch.compiler.is_compiling() and x.shape[1] <= SHORT_PROMPT:
        with sdpa_kernel(SDPA_PRIORITY, set_priority=True):
            attended = attend(q, k, v)
    else:
        attended = attend(q, k, v)
    return _after_attention(x, attended, w, s), q, k, v


@compilable
def decode(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    w: LayerWeights,
    s: LayerShape,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    seen: Tensor | None,
) -> Tensor:
    """Run a layer over one token of each sample, and write the token into its slot of a cache.

    Args:
        x: Hidden states [B, 1, C].
        cos: Cosines [B or 1, 1, width] of the rotary embedding.
        sin: Sines of the same shape.
        w: The layer's tensors.
        s: The layer's numbers.
        keys: The cache's keys [B, key heads, slots, width], written in place.
        values: The cache's values, likewise.
        slot: The token's slot [B].
        seen: The slots that hold a token [B, slots], the new one's included; None where `decode_attention` attends,
            which takes those up to the token's.

    Returns:
        The output [B, 1, C].
    """
    q, k, v = _heads(x, cos, sin, w, s)
    samples = torch.arange(len(x), device=x.device)
    keys[samples, :, slot], values[samples, :, slot] = k[:, :, 0], v[:, :, 0]
    # Queries that share a key head are as many queries of one head.
    grouped = q.reshape(len(x), s.key_heads, -1, s.width)
    if seen is None:
        attended = decode_attention(grouped, keys, values, slot, s.scale)
    else:
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None], scale=s.scale)
    return _after_attention(x, attended.reshape(len(x), s.heads, 1, s.width), w, s)
