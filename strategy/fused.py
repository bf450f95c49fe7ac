"""A Llama-shaped decoder layer as two functions of tensors, which torch.compile fuses and CUDA graphs capture.

Every backbone here decodes with such layers, under the same names of modules; the functions give what the stock
layers give up to rounding. Projections that read the same input are one matrix product.
"""

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from strategy.attention import rotated, rows_of
from strategy.fusing import fusable

# Linear layers whose weights lie one behind the other in memory, so that one product serves them all.
MERGED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


SPLIT = "mp_group"  # where DeepSpeed's tensor parallelism leaves the group on a projection that it has split
SHORT = 1024  # tokens of a prompt, or of a batch of them
# cuDNN's attention is the faster one for long prompts, but starts with a memset and a pause.
AT_ONCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Shape(NamedTuple):
    """What of a layer is no tensor: query and key heads, their width, epsilon of its norms, scale of its logits.

    group: the name of the group of processes that it is split over, each of which has such a share of the heads.
    """

    heads: int
    key_heads: int
    width: int
    epsilon: float
    scale: float
    group: str | None = None


class Weights(NamedTuple):
    """What of a layer is a tensor, [out, in] for those that multiply."""

    before: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    behind: Tensor
    gate_up: Tensor
    down: Tensor


def sharded(layers: nn.ModuleList) -> bool:
    """Whether a process holds layers' weights only while they run, gathered from all by DeepSpeed's ZeRO stage 3."""
    return hasattr(next(layers.parameters()), "ds_shape")


def group_of(layers: Any) -> ProcessGroup | None:
    """The ranks that the heads of layers are split over, in the heads' order; None if they are not."""
    return getattr(layers[0].self_attn.q_proj, SPLIT, None)


def unfit(layers: nn.ModuleList) -> str | None:
    """Why these functions would not give what a decoder's layers give; None if they would."""
    if sharded(layers):
        return "a decoder whose weights are sharded (ZeRO stage 3)"
    if len({(p.device, p.dtype) for p in layers.parameters()}) > 1 or next(layers.parameters()).is_meta:
        return "a decoder with weights of several types or devices, or none in memory"
    return next(filter(None, map(_unfit, layers)), None)


def _unfit(layer: Any) -> str | None:
    parts: list[Any] = [getattr(getattr(layer, block, None), name, None) for block, names in MERGED for name in names]
    parts += [getattr(getattr(layer, "self_attn", None), "o_proj", None)]
    parts += [getattr(getattr(layer, "mlp", None), "down_proj", None)]
    if any(type(part) is not nn.Linear and not hasattr(part, SPLIT) for part in parts):
        return f"a {type(layer).__name__} without plain linear projections (experts, adapters, quantised)"
    if any(part.bias is not None for part in parts[3:]):
        return f"a {type(layer).__name__} with biases behind its attention"
    silu = torch.linspace(-2, 2, 5, device=layer.mlp.down_proj.weight.device)
    if not torch.equal(layer.mlp.act_fn(silu), F.silu(silu)):
        return f"an activation other than SiLU ({type(layer.mlp.act_fn).__name__})"
    return None


def shape_of(layer: Any) -> Shape:
    """The numbers of a layer."""
    module, group = layer.self_attn, group_of([layer])
    heads, key_heads = (len(module.get_submodule(name).weight) // module.head_dim for name in ("q_proj", "k_proj"))
    scale = getattr(module, "scaling", module.head_dim**-0.5)
    epsilon = layer.input_layernorm.variance_epsilon
    return Shape(heads, key_heads, module.head_dim, epsilon, scale, str(group.group_name) if group else None)


@torch.no_grad()
def merge(layers: nn.ModuleList) -> list[Weights]:
    """Lay the projections of the same input behind each other, in each layer, and return each one's tensors.

    Parameters stay the same objects with the same values; their memory is now shared. `split` undoes it.
    """
    weights = []
    for layer in layers:
        weights.append(_merge(layer))
        # Else torch cuts the next layer's short ones out of what this one's long ones were in, and what is left of
        # that is too short for anything: 3 GB of the 5 that Qwen2-VL-72B leaves on each of two GPUs of 80.
        torch.cuda.empty_cache()
    return weights


def _merge(layer: Any) -> Weights:
    joined: list[Tensor] = []
    for block, names in MERGED:
        linears = [getattr(layer, block).get_submodule(name) for name in names]
        for kind in ("weight", "bias"):
            own = [getattr(linear, kind) for linear in linears]
            if own[0] is None:
                continue
            whole = torch.cat([parameter.data for parameter in own])
            for parameter, part in zip(own, whole.split([len(parameter) for parameter in own]), strict=True):
                parameter.data = part
            joined.append(whole)
    qkv, *bias, gate_up = joined
    attention = layer.self_attn
    norms = [
        getattr(attention, name).weight.data if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
    ]
    return Weights(
        before=layer.input_layernorm.weight.data,
        qkv=qkv,
        qkv_bias=bias[0] if bias else None,
        q_norm=norms[0],
        k_norm=norms[1],
        out=attention.o_proj.weight.data,
        behind=layer.post_attention_layernorm.weight.data,
        gate_up=gate_up,
        down=layer.mlp.down_proj.weight.data,
    )


@torch.no_grad()
def split(layers: nn.ModuleList, weights: list[Weights]) -> None:
    """Give each projection memory of its own again, and empty the list of tensors that `merge` gave for the layers."""
    # First, so that it takes the memory of one layer more and not of all; and in place, since others may hold the list,
    # such as the frames of a call that has failed.
    weights.clear()
    for layer, (block, names) in product(layers, MERGED):
        for name in names:
            for parameter in getattr(layer, block).get_submodule(name).parameters():
                if parameter.untyped_storage().nbytes() > parameter.nbytes:
                    parameter.data = parameter.data.clone()


@fusable
def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension, in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _heads(x: Tensor, cos: Tensor, sin: Tensor, w: Weights, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, [B, heads, L, width], of hidden states [B, L, C]."""
    mixed = F.linear(norm(x, w.before, s.epsilon), w.qkv, w.qkv_bias).unflatten(-1, (-1, s.width))
    q, k, v = mixed.split((s.heads, s.key_heads, s.key_heads), dim=2)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = norm(q, w.q_norm, s.epsilon), norm(k, w.k_norm, s.epsilon)
    q, k = rotated(q.transpose(1, 2), cos, sin), rotated(k.transpose(1, 2), cos, sin)
    v = v.transpose(1, 2)
    # A copy takes time, but keeping what is none keeps the queries and keys beside the values.
    return q, k, v if x.shape[0] * x.shape[1] <= SHORT else v.contiguous()


def _summed(share: Tensor, s: Shape) -> Tensor:
    """The sum over all processes of a split layer; what is given for a layer that is not."""
    if s.group is None:
        return share
    # As torch.compile knows them; calls of torch.distributed it would not trace with a group.
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(share, "sum", s.group))


def _rest(x: Tensor, attended: Tensor, w: Weights, s: Shape) -> Tensor:
    """What follows the attention [B, heads, L, width] in a layer with input x [B, L, C]."""
    x = x + _summed(F.linear(attended.transpose(1, 2).flatten(2), w.out), s)
    gate, up = F.linear(norm(x, w.behind, s.epsilon), w.gate_up).chunk(2, dim=-1)
    return x + _summed(F.linear(F.silu(gate) * up, w.down), s)


@fusable
def rows(q: Tensor, keys: Tensor, at: Tensor, s: Shape) -> Tensor:
    """Attention, float32 [B, heads, R, L], that the tokens at `at` [B, R] pay, which see all before them.

    q, keys: a layer's, [B, heads or key heads, L, width], as `prefill` gives them.
    """
    picked = rows_of(q.transpose(1, 2), at).transpose(1, 2).float().unflatten(1, (s.key_heads, -1))
    if at.shape[1] == 1 and torch.compiler.is_compiling():
        # A sum of products, which is fused with what follows as a matrix product is not.
        logits = (picked * keys.float()[:, :, None]).sum(-1)[..., None, :]
    else:
        logits = torch.einsum("bkgrd,bkld->bkgrl", picked, keys.float())
    seen = torch.arange(keys.shape[2], device=keys.device) <= at[:, :, None]
    logits = (logits.flatten(1, 2) * s.scale).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    return logits.softmax(dim=-1)


@fusable
def fill(keys: Tensor, values: Tensor, from_keys: Tensor, from_values: Tensor, places: Tensor) -> None:
    """Put the tokens at `places` [B, L] of given keys and values [B, key heads, L', width] first into a cache's."""
    index = places[:, None, :, None]
    for slots, given in ((keys, from_keys), (values, from_values)):
        slots[:, :, : places.shape[1]] = given.take_along_dim(index, 2)


@fusable
def prefill(x: Tensor, cos: Tensor, sin: Tensor, w: Weights, s: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer over prompts [B, L, C] that end in their padding, if they have any.

    cos, sin: [B or 1, L, width]. Returns the output [B, L, C], and queries, keys and values [B, heads or key heads, L,
    width].
    """
    q, k, v = _heads(x, cos, sin, w, s)
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=s.scale, enable_gqa=s.heads != s.key_heads)
    if torch.compiler.is_compiling() and x.shape[1] <= SHORT:
        with sdpa_kernel(AT_ONCE, set_priority=True):
            attended = attend(q, k, v)
    else:
        attended = attend(q, k, v)
    return _rest(x, attended, w, s), q, k, v


@fusable
def decode(
    x: Tensor, cos: Tensor, sin: Tensor, w: Weights, s: Shape, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor
) -> Tensor:
    """A layer over one token a sample, [B, 1, C], which goes into its slot [B] of a cache.

    keys, values: [B, key heads, slots, width], written in place. seen: [B, slots], those that hold a token, the
    new one's too. Returns [B, 1, C].
    """
    q, k, v = _heads(x, cos, sin, w, s)
    rows = torch.arange(len(x), device=x.device)
    keys[rows, :, slot], values[rows, :, slot] = k[:, :, 0], v[:, :, 0]
    # Queries that share a key head are as many queries of one head.
    grouped = q.reshape(len(x), s.key_heads, -1, s.width)
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None], scale=s.scale)
    return _rest(x, attended.reshape(len(x), s.heads, 1, s.width), w, s)
