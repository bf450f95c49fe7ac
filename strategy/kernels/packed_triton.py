"""The Triton kernel of attention inside the pieces of a packed sequence.

The heads of vision towers are 64, 72 or 80 wide, and a product in Triton takes widths that are powers of 2. So a head
is computed in two parts, such as 64 and 16, where other kernels fill it up to 96 or 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# On an H200 the fastest of those tried at widths 80 and 72: rows of queries and of keys, warps, blocks loaded ahead.
QUERIES, KEYS, WARPS, STAGES = 128, 64, 8, 3
REGISTERS = 128  # of a thread, so that two programs fit on a multiprocessor; the compiler takes 132 at width 72
NARROWEST = 16  # width of a product in Triton


@triton.jit
def _load(rows, start: tl.constexpr, size: tl.constexpr, width: tl.constexpr, real, masked: tl.constexpr):
    """Load columns of a head for pointers to rows [N, 1], 0 outside its width and, if masked, where not real [N, 1]."""
    columns = start + tl.arange(0, size)[None, :]
    if masked:
        loaded = tl.load(rows + columns, mask=real & (columns < width), other=0.0)
    elif start + size > width:
        loaded = tl.load(rows + columns, mask=columns < width, other=0.0)
    else:
        loaded = tl.load(rows + columns)
    return loaded


@triton.jit
def _load_head(rows, first: tl.constexpr, second: tl.constexpr, width: tl.constexpr, real, masked: tl.constexpr):
    """Load both parts of a head; where there is one only, it comes twice."""
    part_1 = _load(rows, 0, first, width, real, masked)
    part_2 = part_1
    if second > 0:
        part_2 = _load(rows, first, second, width, real, masked)
    return part_1, part_2


@triton.jit
def _store(rows, values, start: tl.constexpr, size: tl.constexpr, width: tl.constexpr, real):
    columns = start + tl.arange(0, size)[None, :]
    tl.store(rows + columns, values, mask=real & (columns < width))


@triton.jit
def _attend(sums, query, key, value, scale, real, masked: tl.constexpr, second: tl.constexpr):
    """Add a block of keys and values to what the queries have seen: two parts of sums, highest logits, totals."""
    sum_1, sum_2, highest, total = sums
    logits = tl.dot(query[0], key[0].T)
    if second > 0:
        logits = tl.dot(query[1], key[1].T, logits)
    if masked:
        logits = tl.where(real.T, logits, -float("inf"))
    higher = tl.maximum(highest, tl.max(logits, 1) * scale)
    shares, shrink = tl.math.exp2(logits * scale - higher[:, None]), tl.math.exp2(highest - higher)
    total = total * shrink + tl.sum(shares, 1)
    shares = shares.to(value[0].dtype)
    sum_1 = tl.dot(shares, value[0], sum_1 * shrink[:, None])
    if second > 0:
        sum_2 = tl.dot(shares, value[1], sum_2 * shrink[:, None])
    return sum_1, sum_2, higher, total


@triton.jit(do_not_specialize=["blocks"])  # else compiled anew where it is 1 or a multiple of 16
def _kernel(
    query,
    key,
    value,
    output,
    ends,
    blocks,
    scale,
    query_step,
    key_step,
    value_step,
    output_step,
    width: tl.constexpr,
    first: tl.constexpr,
    second: tl.constexpr,
    num_queries: tl.constexpr,
    num_keys: tl.constexpr,
    stages: tl.constexpr,
):
    piece, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    start = tl.load(ends + piece).to(tl.int64)
    length = (tl.load(ends + piece + 1) - start).to(tl.int32)
    if block * num_queries < length:
        rows, columns = block * num_queries + tl.arange(0, num_queries)[:, None], tl.arange(0, num_keys)[:, None]
        inside = rows < length
        own = query + (start + rows) * query_step + head * width
        keys = key + (start + columns) * key_step + head * width
        values = value + (start + columns) * value_step + head * width
        own_query = _load_head(own, first, second, width, inside, True)
        sum_1 = tl.zeros([num_queries, first], tl.float32)
        sum_2 = sum_1
        if second > 0:
            sum_2 = tl.zeros([num_queries, second], tl.float32)
        sums = sum_1, sum_2, tl.full([num_queries], -float("inf"), tl.float32), tl.zeros([num_queries], tl.float32)
        scale = scale * 1.4426950408889634  # the GPU computes powers of 2
        whole = length // num_keys * num_keys
        for _ in tl.range(0, whole, num_keys, num_stages=stages):
            own_key = _load_head(keys, first, second, width, inside, False)
            own_value = _load_head(values, first, second, width, inside, False)
            sums = _attend(sums, own_query, own_key, own_value, scale, inside, False, second)
            keys += num_keys * key_step
            values += num_keys * value_step
        if whole < length:
            real = whole + columns < length
            # Behind the loop, Triton's pipeline leaves the pointers blocks too far.
            keys = key + (start + whole + columns) * key_step + head * width
            values = value + (start + whole + columns) * value_step + head * width
            own_key = _load_head(keys, first, second, width, real, True)
            own_value = _load_head(values, first, second, width, real, True)
            sums = _attend(sums, own_query, own_key, own_value, scale, real, True, second)
        out = output + (start + rows) * output_step + head * width
        total = sums[3][:, None]
        _store(out, (sums[0] / total).to(output.dtype.element_ty), 0, first, width, inside)
        if second > 0:
            _store(out, (sums[1] / total).to(output.dtype.element_ty), first, second, width, inside)


def attend(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Compute attention inside pieces, as `packed_attention`.

    Args:
        query, key, value: [L, heads, head width] of half precision.
        ends: Int32 bounds of the pieces on the same device.
        longest: Tokens of the longest piece.
    """
    _, heads, width = query.shape
    query, key, value = (each if each.stride()[1:] == (width, 1) else each.contiguous() for each in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    first = max(NARROWEST, 1 << (width.bit_length() - 1))
    second = max(NARROWEST, triton.next_power_of_2(width - first)) if width > first else 0
    blocks = triton.cdiv(longest, QUERIES)
    steps = [tensor.stride(0) for tensor in (query, key, value, output)]
    parts = {"width": width, "first": first, "second": second}
    # Wider heads fill the shared memory of a multiprocessor by one program.
    registers = {"maxnreg": REGISTERS} if first + second < 128 else {}
    launch = _kernel[(blocks * (len(ends) - 1), heads)]
    launch(
        query, key, value, output, ends, blocks, width**-0.5, *steps, **parts,
        num_queries=QUERIES, num_keys=KEYS, stages=STAGES, num_warps=WARPS, num_stages=STAGES, **registers,
    )  # fmt: skip
    return output
