"""Attention inside the pieces of a packed sequence, and of one token over a cache: the operations and their kernels."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted_attention import (
    CACHES,
    LENGTHS,
    WIDTHS,
    bounds,
    decoding,
    decoding_spelled_out,
    packed,
    spelled_out,
)
from torch.utils.flop_counter import FlopCounterMode

from strategy.kernels import decode_attention
from strategy.kernels.packed_attention import (
    can_launch,
    flash_agrees,
    keeping_bounds,
    packed_attention,
    packed_causal_attention,
)

TESTS = Path(__file__).parents[1]
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    alike=st.booleans(),
    width=st.sampled_from([8, 16, 80]),
)
def test_tokens_see_each_other_inside_their_pieces_only(lengths, alike, width):
    lengths = [lengths[0]] * len(lengths) if alike else lengths
    tensors = packed(width, lengths, torch.float32)
    seen = packed_attention(*tensors, bounds(lengths))
    assert seen.is_contiguous()
    torch.testing.assert_close(seen.double(), spelled_out(*tensors, lengths), rtol=0, atol=ROUNDING[torch.float32])


def prompts(heads, key_heads, width, lengths, dtype=torch.float32):
    """Queries, keys and values [L, heads, width] as views of [heads, L, width]."""
    return [
        torch.randn(count, sum(lengths), width).to(dtype).transpose(0, 1) for count in (heads, key_heads, key_heads)
    ]


def causal_spelled_out(query, key, value, lengths, scale):
    """Attention [L, heads, width] to what comes before inside pieces, in float64."""
    pieces = []
    for piece in zip(*(tensor.double().split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (each.transpose(0, 1).repeat_interleave(query.shape[1] // each.shape[1], 0) for each in piece)
        hidden = torch.ones_like(q @ k.mT).triu(1).bool()
        pieces.append(((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    width=st.sampled_from([8, 12, 128]),
    scale=st.sampled_from([0.05, 0.3]),
)
def test_tokens_of_prompts_see_those_before_them_inside_their_prompt_only(lengths, heads, width, scale):
    tensors = prompts(*heads, width, lengths)
    seen = packed_causal_attention(*tensors, bounds(lengths), scale)
    assert seen.is_contiguous()
    expected = causal_spelled_out(*tensors, lengths, scale)
    torch.testing.assert_close(seen.double(), expected, rtol=0, atol=ROUNDING[torch.float32])


@pytest.mark.parametrize("lengths", [(24,), (8, 8), (3, 20, 1)])
def test_its_operations_are_counted_as_those_of_pieces_one_by_one(lengths):
    tensors = packed(16, lengths, torch.float32)
    with FlopCounterMode(display=False) as together:
        packed_attention(*tensors, bounds(lengths))
    with FlopCounterMode(display=False) as apart:
        for piece in zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in tensors), strict=True):
            query, key, value = piece
            torch.bmm(torch.bmm(query, key.mT).softmax(-1), value)
    assert together.get_total_flops() == apart.get_total_flops() > 0


def test_the_interpreted_kernels_compute_the_same():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "interpreted_attention.py"]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert len(found) == len(WIDTHS) * len(LENGTHS) + len(CACHES)
    assert {case: error for case, error in found.items() if not error < ROUNDING[torch.float16]} == {}


KERNELS = {
    "packed": {"width": 80, "first": 64, "second": 16},
    "decode, a query of a head": {"shared_by": 1, "width": 128, "num_rows": 16, "num_columns": 128},
    "decode, seven of a head": {"shared_by": 7, "width": 128, "num_rows": 16, "num_columns": 128},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_load_blocks_ahead_and_multiply_on_tensor_cores(kernel):
    # Where the compiler cannot prove that loads are aligned, it leaves both out without a word.
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from strategy.kernels import decode_triton, packed_triton

    if kernel == "packed":
        module, pointers, step = packed_triton, ("query", "key", "value", "output"), "wgmma.mma_async"
        types = {"ends": "*i32", "blocks": "i32", "scale": "fp32"} | {f"{name}_step": "i32" for name in pointers}
        blocks = {"num_queries": module.QUERIES, "num_keys": module.KEYS, "stages": module.STAGES}
        options = {"maxnreg": module.REGISTERS}
    else:
        module, pointers, step = decode_triton, ("query", "keys", "values", "output"), "mma.sync"
        types = {"slot": "*i64", "scale": "fp32", "slots": "i32", "key_heads": "i32"}
        blocks, options = {"num_keys": module.KEYS, "stages": module.STAGES}, {}
    types = dict.fromkeys(pointers, "*fp16") | types
    constants = KERNELS[kernel] | blocks
    unaligned = ("blocks", "scale", "key_heads")
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(types) if name not in unaligned}
    source = ASTSource(module._kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options |= {"num_warps": module.WARPS, "num_stages": module.STAGES}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "cp.async.cg" in made.asm["ptx"]
    assert step in made.asm["ptx"]


@pytest.mark.parametrize(
    ("probe", "more", "instead"),
    [
        (can_launch, (), "vision towers attend by torch's kernels"),
        (decode_attention.can_launch, (7,), "decode steps attend by torch's kernels"),
        (flash_agrees, (4, 2), "packed prompts are attended to one by one"),
    ],
)
def test_where_a_kernel_cannot_be_launched_another_attends_with_a_warning(probe, more, instead):
    # Here there is no GPU; elsewhere there may be no C compiler, which Triton needs.
    probe.cache_clear()
    with pytest.warns(UserWarning, match=rf"^{instead}, since a faster kernel failed its trial \(.+\)"):
        assert not probe(torch.device("cpu"), torch.float16, 80, *more)


@pytest.mark.parametrize("wrong", [False, True])
def test_flash_attention_that_computes_something_else_is_not_used(wrong, monkeypatch):
    def attend(query, key, value, ends, *_, scale, window_size, **more):
        assert window_size == (-1, 0)
        seen = causal_spelled_out(query, key, value, ends.diff().tolist(), scale)
        return (seen.flip(0) if wrong else seen).to(query.dtype)

    monkeypatch.setattr("strategy.kernels.packed_attention.varlen_attn", attend)
    flash_agrees.cache_clear()
    with (
        pytest.warns(UserWarning, match=r"^packed prompts are attended to one by one, since")
        if wrong
        else nullcontext()
    ):
        assert flash_agrees(torch.device("cpu"), torch.float16, 16, 4, 2) is not wrong
    flash_agrees.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_on_a_gpu_it_computes_the_same(width, dtype):
    for lengths in (*LENGTHS, (5184,), (2116, 2500, 2916)):
        tensors = [tensor.cuda() for tensor in packed(width, lengths, dtype)]
        kept = {}
        with keeping_bounds(kept):
            seen = packed_attention(*tensors, bounds(lengths))
        assert len(kept) == (dtype != torch.float32)
        difference = (seen.double() - spelled_out(*tensors, lengths)).abs().max()
        assert difference < ROUNDING[dtype], lengths


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "width"), [((32, 32), 128), ((28, 4), 128), ((4, 2), 16)])
def test_on_a_gpu_tokens_of_prompts_see_the_same(heads, width, dtype):
    for lengths in ((1,), (17, 1, 300), (1351, 700, 1400)):
        tensors = [tensor.cuda() for tensor in prompts(*heads, width, lengths, dtype)]
        seen = packed_causal_attention(*tensors, bounds(lengths), width**-0.5)
        assert seen.is_contiguous()
        assert dtype == torch.float32 or flash_agrees(seen.device, dtype, width, *heads)
        difference = (seen.double() - causal_spelled_out(*tensors, lengths, width**-0.5)).abs().max()
        assert difference < 4 * ROUNDING[dtype], lengths


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*CACHES, (4, 32, 1, 128, 704), (4, 4, 7, 128, 1408)])
def test_on_a_gpu_a_token_attends_to_the_filled_slots(shape, dtype):
    tensors = [tensor.cuda() for tensor in decoding(*shape, dtype)]
    assert decode_attention.kernel_takes(tensors[1], shape[2])
    seen = decode_attention.decode_attention(*tensors, 0.1)
    assert (seen.double() - decoding_spelled_out(*tensors, 0.1)).abs().max() < ROUNDING[dtype]
