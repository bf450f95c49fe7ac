"""Compare the Triton kernel of packed attention, interpreted on the CPU, with attention spelled out in float64.

The process needs TRITON_INTERPRET=1 from its start. The answer is a line of JSON: case to largest difference.
"""

import json
from itertools import accumulate, chain

import torch
from triton.runtime import interpreter

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


def main() -> None:
    allow_numpy_2_4()
    torch.manual_seed(0)
    found = {}
    for width in WIDTHS:
        for lengths in LENGTHS:
            tensors = packed(width, lengths, torch.float16)
            seen = attend(*tensors, bounds(lengths), max(lengths))
            difference = seen.double() - spelled_out(*tensors, lengths)
            found[f"{width} {lengths}"] = difference.abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
