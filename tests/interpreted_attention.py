"""Compare the Triton kernels of attention, interpreted on the CPU, with attention spelled out in float64.

The process needs TRITON_INTERPRET=1 from its start. The answer is a line of JSON: case to largest difference.
"""

import json
from itertools import accumulate, chain

import torch
from triton.runtime import interpreter

from strategy.kernels import decode_triton
from strategy.kernels.packed_triton import KEYS, QUERIES, attend

WIDTHS = (80, 72, 64, 40, 16)
LENGTHS = ((1,), (KEYS,), (QUERIES,), (QUERIES + KEYS + 2, 1, KEYS, KEYS - 1))


def allow_numpy_2_4() -> None:
    """Let a loop of a kernel end at a number that was loaded, which numpy since 2.4 has as an array of one element."""
    stock = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def spelled_out(query, key, value, lengths):
    """Attention [L, heads, head width] inside pieces, in float64."""
    pieces = []
    for piece in zip(*(tensor.double().split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (each.transpose(0, 1) for each in piece)
        pieces.append(((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


def packed(width, lengths, dtype):
    """Queries, keys and values as a projection of all three leaves them: the values lie between the others."""
    mixed = torch.randn(sum(lengths), 3, 2, width).to(dtype)
    query, key, value = mixed.unbind(1)
    return query.contiguous(), key.contiguous(), value


def bounds(lengths):
    """Where pieces begin, and where the last one ends."""
    return torch.tensor([*chain([0], accumulate(lengths))], dtype=torch.int32)


# Of a cache: samples, key heads, queries of a key head, width, slots.
CACHES = ((3, 2, 1, 128, 192), (2, 1, 7, 128, 64), (2, 2, 4, 80, 128), (4, 2, 3, 16, 64), (2, 1, 17, 100, 64))


def decoding(batch, key_heads, shared_by, width, slots, dtype):
    """Queries, and a cache whose slots behind the tokens' own hold no numbers, with the slots of the tokens."""
    query = torch.randn(batch, key_heads, shared_by, width).to(dtype)
    keys, values = torch.randn(2, batch, key_heads, slots, width).to(dtype)
    slot = torch.tensor([slots - 1, 0, slots // 2 - 1, slots // 2])[:batch]
    behind = torch.arange(slots) > slot[:, None]
    for tensor in (keys, values):
        tensor.transpose(1, 2)[behind] = torch.nan
    return query, keys, values, slot


def decoding_spelled_out(query, keys, values, slot, scale):
    """Attention of one token a sample, in float64."""
    rows = []
    for own_query, own_keys, own_values, last in zip(query.double(), keys.double(), values.double(), slot, strict=True):
        seen = own_keys[:, : last + 1], own_values[:, : last + 1]
        rows.append((own_query @ seen[0].mT * scale).softmax(-1) @ seen[1])
    return torch.stack(rows)


def main() -> None:
    allow_numpy_2_4()
    torch.manual_seed(0)
    found = {}
    for shape in CACHES:
        tensors = decoding(*shape, torch.float16)
        difference = decode_triton.attend(*tensors, 0.1).double() - decoding_spelled_out(*tensors, 0.1)
        found[f"decoding {shape}"] = difference.abs().max().item()
    for width in WIDTHS:
        for lengths in LENGTHS:
            tensors = packed(width, lengths, torch.float16)
            seen = attend(*tensors, bounds(lengths), max(lengths))
            difference = seen.double() - spelled_out(*tensors, lengths)
            found[f"{width} {lengths}"] = difference.abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
