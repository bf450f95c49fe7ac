"""What the engine owes where there is a GPU; nothing of this runs in CI, which has none.

A backbone's tests import everything from here and give a fixture `family`, see `engine_checks`.
"""

import copy
from contextlib import nullcontext
from itertools import chain
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from engine_checks import LAYOUTS, STAGES, TOLERANCE, Batch, Family, first_layers, make, prefill, run_with_steps
from matrix import BARE
from transformers import LlamaConfig, LlamaModel

import strategy
from strategy import VTRConfig
from strategy.graph.cuda_graphs import CudaGraphCache, ProgramKey
from strategy.kernels import llama_layer
from strategy.kernels.layer_spec import llama_spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CONFIG = VTRConfig(keep_tokens=[20, 12, 5], **STAGES)


def on_gpu(family: Family, dtype: torch.dtype) -> Any:
    return copy.deepcopy(family.decoder("sdpa")).to("cuda", dtype)


def moved(batch: Batch, dtype: torch.dtype) -> Batch:
    mask = None if batch.mask is None else batch.mask.cuda()
    return Batch(batch.embeddings.to("cuda", dtype), mask, batch.layout)


def run_on_gpu(family, batch, dtype, decoder=None, config=CONFIG):
    """The record of a prefill, and the scores [G, N] of each group at each stage."""
    scores = []

    def watch(view: Any, seen: Any, kept: Any) -> None:
        scores.append((view.stage, view.grids, seen))

    decoder, there = decoder or on_gpu(family, dtype), moved(batch, dtype)
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout, watch=watch) as run:
        call = {"attention_mask": there.mask, "position_ids": batch.positions().cuda()}
        extra = {
            name: value.cuda() if torch.is_tensor(value) else [part.to("cuda", dtype) for part in value]
            for name, value in batch.extra(family).items()
        }
        with torch.no_grad():
            decoder(inputs_embeds=there.embeddings, use_cache=True, **call, **extra)
    return run, scores


# Every strategy at its earliest layers: one before the first layer too, where it can.
EARLY = [
    VTRConfig(strategy=name, keep_tokens=[20, 12, 5], **STAGES | {"prune_layer": [first, 4, 8]})
    for name in BARE
    for first in first_layers(name)
]


def called(config: VTRConfig) -> str:
    return f"{config.strategy} at {config.prune_layer}"


@pytest.mark.parametrize("config", EARLY, ids=called)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gpu_keeps_what_the_cpu_keeps(family, name, config):
    batch = make(name, family.decoder("sdpa").config.hidden_size)
    with strategy.prune(family.decoder("sdpa"), config, backbone=family.name, layout=batch.layout) as run:
        prefill(family, family.decoder("sdpa"), batch)
    there, _ = run_on_gpu(family, batch, torch.float32, config=config)
    assert there.multiply_adds == run.multiply_adds
    assert all(there.means()["seconds"][part] > 0 for part in ("prefill", "scoring"))
    for mine, its in zip(there.stages, run.stages, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine.kept, its.kept, strict=True))


def row_of(batch: Batch, sample: int) -> tuple[Any, int]:
    """The grids of a sample, and its place among the samples with the same ones before it."""
    kinds = [tuple((grid, *lead) for _, grid, *lead in spans) for spans in batch.layout]
    return tuple(grid for _, grid, *_ in batch.layout[sample]), kinds[:sample].count(kinds[sample])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_in_half_precision_a_batch_keeps_what_its_samples_keep_alone_but_for_ties(family, name, dtype, record_property):
    batch = make(name, family.decoder("sdpa").config.hidden_size)
    together, scores = run_on_gpu(family, batch, dtype)
    ties = 0
    for sample, spans in enumerate(batch.layout):
        real = slice(None) if batch.mask is None else batch.mask[sample].bool()
        pad = 0 if batch.mask is None else int(batch.mask[sample].argmax())
        shifted = [(tuple(i - pad for i in at) if isinstance(at, tuple) else at - pad, *kind) for at, *kind in spans]
        alone, own = run_on_gpu(family, Batch(batch.embeddings[sample : sample + 1, real], None, [shifted]), dtype)
        grids, row = row_of(batch, sample)
        for number, stage in enumerate(alone.stages):
            mine, its = stage.kept[0], together.stages[number].kept[sample]
            if torch.equal(mine, its):
                continue
            [one] = [s[0] for at, _, s in own if at == number]
            other = next(s[row] for at, kinds, s in scores if (at, kinds) == (number, grids))
            rounding, cut = (one - other).abs().max(), one.sort(descending=True).values[len(mine) - 1]
            left = torch.arange(len(one), device="cuda") if not number else alone.stages[number - 1].kept[0]
            moved_over = [at for at, token in enumerate(left.tolist()) if (token in mine) != (token in its)]
            assert (one[moved_over] - cut).abs().max() <= 2 * rounding
            ties += 1
            break  # what follows was scored on other tokens
    record_property("samples with a tie at the cut", ties)


@pytest.mark.parametrize("config", EARLY, ids=called)
def test_nothing_waits_for_the_gpu_between_the_first_layer_and_the_last(family, config):
    batch = make("images of different size", family.decoder("sdpa").config.hidden_size)
    decoder = on_gpu(family, torch.bfloat16)
    handles = [
        decoder.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
        decoder.layers[-1].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        run, _ = run_on_gpu(family, batch, torch.bfloat16, decoder, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()
    assert len(run.stages) == 3


def test_what_waits_for_the_device_runs_without_a_graph_and_leaves_the_others_alone():
    graphs, given = CudaGraphCache(torch.device("cuda")), torch.ones(3, device="cuda")
    for name in ("before", "waits", "after"):
        program = (lambda x: x * x.sum().item()) if name == "waits" else torch.neg
        expected = program(given)
        assert torch.equal(graphs.run(ProgramKey(name), program, [given]), expected)
        fails = pytest.warns(UserWarning, match="waits: runs without a CUDA graph")
        with fails if name == "waits" else nullcontext():
            assert torch.equal(graphs.run(ProgramKey(name), program, [given]), expected)
        torch.manual_seed(1)
        drawn = torch.randn(5, device="cuda")
        torch.manual_seed(1)
        assert torch.equal(torch.randn(5, device="cuda"), drawn)
    assert {key.kind for key in graphs.graphs} == {"before", "after"}
    assert torch.equal(graphs.run(ProgramKey("before"), torch.neg, [2 * given]), -2 * given)


def test_graphs_share_memory_and_give_the_same_in_any_order():
    graphs, wide = CudaGraphCache(torch.device("cuda")), torch.rand(1 << 22, device="cuda")
    programs = [lambda x, by=by: ((x * by).cos() * by).sin() for by in range(1, 5)]
    expected = [program(wide) for program in programs]
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 1, 3)]
    given = [
        [(number, graphs.run(ProgramKey("number", number), programs[number], [wide])) for number in order]
        for order in orders
    ]
    assert len(graphs.graphs) == len(programs)
    for number, result in chain.from_iterable(given):
        assert torch.equal(result, expected[number])
    # Each keeps an input and an output, and what lies between is there once.
    assert graphs.size <= (2 * len(programs) + 4) * wide.nbytes


def test_what_does_not_fit_beside_another_twice_is_not_captured_again():
    wide = torch.rand(1 << 22, device="cuda")
    graphs = CudaGraphCache(torch.device("cuda"), limit=3 * wide.nbytes)
    for turn in range(4):
        for name in ("one", "other"):
            assert torch.equal(graphs.run(ProgramKey(name), torch.neg, [wide]), -wide)
        assert (len(graphs.graphs), len(graphs.rejected)) == [(0, 0), (1, 0), (1, 1), (1, 1)][turn]
        assert graphs.size <= graphs.limit


def test_merging_and_parting_layers_leaves_no_gaps_in_memory():
    def gaps():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    # Few key heads, so that what is merged of the attention would fit where a part of the MLP was, with a rest.
    shape = {"hidden_size": 4096, "intermediate_size": 7424, "num_attention_heads": 32, "num_key_value_heads": 4}
    torch.set_default_dtype(torch.half)
    try:
        with torch.device("cuda"):
            layers = LlamaModel(LlamaConfig(**shape, num_hidden_layers=6, vocab_size=8)).layers
    finally:
        torch.set_default_dtype(torch.float)
    # Beside the short ones, which torch puts into 20 MiB at a time.
    most, held = gaps() + (20 << 20), torch.cuda.memory_allocated()
    specs = [llama_spec(layer) for layer in layers]
    weights = llama_layer.pack_projections(layers, specs)
    assert torch.equal(weights[3].gate_up[:7424], layers[3].mlp.gate_proj.weight)
    assert gaps() <= most
    llama_layer.unpack_projections(layers, specs, weights)
    assert gaps() <= most
    assert torch.cuda.memory_allocated() == held


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_may_lie_on_several_devices(family, name):
    batch = make(name, family.decoder("sdpa").config.hidden_size)
    expected, run = run_with_steps(family, family.decoder("sdpa"), batch, CONFIG)
    split = copy.deepcopy(family.decoder("sdpa"))
    for number, layer in enumerate(split.layers):
        device = "cuda" if number in (1, 2, 3, 6, 7, 8, 9) else "cpu"
        add_hook_to_module(layer.to(device), AlignDevicesHook(execution_device=device, io_same_device=False))
    add_hook_to_module(split.norm, AlignDevicesHook(execution_device="cpu", io_same_device=False))
    hidden, other = run_with_steps(family, split, batch, CONFIG)
    for mine, its in zip(other.stages, run.stages, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine.kept, its.kept, strict=True))
    for mine, its in zip(hidden[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.cpu(), its, **TOLERANCE)
