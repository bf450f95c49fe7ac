"""The Triton kernel of attention of one token a sample over a cache of fixed size; only the filled slots are read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# On an H200 the fastest of those tried: slots of a block, warps, blocks loaded ahead.
KEYS, WARPS, STAGES = 64, 4, 3
FEWEST = 16  # rows and columns of a product in Triton


@triton.jit
def _kernel(
    query,
    keys,
    values,
    output,
    slot,
    scale,
    slots,
    key_heads,
    shared_by: tl.constexpr,
    width: tl.constexpr,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
    num_keys: tl.constexpr,
    stages: tl.constexpr,
):
    head = tl.program_id(0)  # of all samples
    filled = tl.load(slot + head // key_heads).to(tl.int32) + 1
    rows, columns = tl.arange(0, num_rows)[:, None], tl.arange(0, num_columns)[None, :]
    own = (head * shared_by + rows) * width + columns
    inside = (rows < shared_by) & (columns < width)
    queries = tl.load(query + own, mask=inside, other=0.0)
    first = head.to(tl.int64) * slots * width
    places = tl.arange(0, num_keys)[:, None]
    sums, total = tl.zeros([num_rows, num_columns], tl.float32), tl.zeros([num_rows], tl.float32)
    highest = tl.full([num_rows], -float("inf"), tl.float32)
    scale = scale * 1.4426950408889634  # the GPU computes powers of 2
    for start in tl.range(0, filled, num_keys, num_stages=stages):
        real = start + places < filled
        where = first + (start + places) * width + columns
        own_keys = tl.load(keys + where, mask=real & (columns < width), other=0.0)
        own_values = tl.load(values + where, mask=real & (columns < width), other=0.0)
        logits = tl.where(real.T, tl.dot(queries, own_keys.T) * scale, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        shares, shrink = tl.math.exp2(logits - higher[:, None]), tl.math.exp2(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        sums = tl.dot(shares.to(own_values.dtype), own_values, sums * shrink[:, None])
        highest = higher
    tl.store(output + own, (sums / total[:, None]).to(output.dtype.element_ty), mask=inside)


def attend(query: Tensor, keys: Tensor, values: Tensor, slot: Tensor, scale: float) -> Tensor:
    """Compute attention, as `decode_attention`, given contiguous tensors of half precision."""
    assert all(tensor.is_contiguous() for tensor in (query, keys, values, slot))
    batch, key_heads, shared_by, width = query.shape
    output = torch.empty_like(query)
    rows, columns = (max(FEWEST, triton.next_power_of_2(number)) for number in (shared_by, width))
    _kernel[(batch * key_heads,)](
        query, keys, values, output, slot, scale, keys.shape[2], key_heads, shared_by, width, rows, columns,
        num_keys=KEYS, stages=STAGES, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return output
