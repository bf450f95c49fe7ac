"""The prompts of the Qwens' small checkpoints for the fast path; each one's tests import all from here."""

import copy
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from fast_checks import *  # noqa: F403
from fast_checks import Asked, answer, answered, config, tracing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrix import names_for
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import strategy
from strategy.attach import attachment_of
from strategy.graph.vision import FLASH_REASON, VisionGraphs
from strategy.kernels.compile import compiling
from strategy.kernels.packed_attention import packed_attention
from strategy.metrics.macs import MacCounter

EXAMPLES = Path(__file__).parents[1] / "examples/shapes"
QUESTIONS = ("What is it?", "Is there a red circle in the picture or not?", "How many?")


SIZES = ((336, 336), (224, 336), (112, 168))
# A score, several stages, merged tokens, a selection, and prompts without their questions.
METHODS = ("unpruned", "clse", "pdrop", "sparsevlm", "divprune", "priortr_2f")


def prompt_maker(checkpoint_name, device):
    processor = AutoProcessor.from_pretrained(EXAMPLES / "checkpoints" / checkpoint_name)
    processor.tokenizer.padding_side = "left"
    picture = Image.open(EXAMPLES / "picture.jpg").convert("RGB")

    def prompts(questions, sizes):
        """Prompts, given the sizes of each one's pictures."""
        content = [
            [{"role": "user", "content": [*[{"type": "image"}] * len(own), {"type": "text", "text": question}]}]
            for question, own in zip(questions, sizes, strict=True)
        ]
        text = [processor.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in content]
        pictures = [picture.resize(size) for own in sizes for size in own]
        return dict(processor(text=text, images=pictures or None, return_tensors="pt", padding=True).to(device))

    return prompts


def small(checkpoint_name, device):
    folder, prompts = EXAMPLES / "checkpoints" / checkpoint_name, prompt_maker(checkpoint_name, device)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    large, wide, _ = SIZES
    kinds = {
        "one": prompts(QUESTIONS[:1], [[large]]),
        "several": prompts(QUESTIONS, [[large]] * 3),
        "mixed": prompts(QUESTIONS, [[large], [], [wide]]),
        "text": prompts(QUESTIONS[:1], [[]]),
    }
    return Asked(model, kinds, {"retain_ratio": 0.223}, names_for(checkpoint_name.removeprefix("shapes-")))


@pytest.fixture(scope="module")
def asked(device, checkpoint_name):
    return small(checkpoint_name, device)


@pytest.fixture(scope="module")
def prompts(device, checkpoint_name):
    return prompt_maker(checkpoint_name, device)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(QUESTIONS), st.lists(st.sampled_from(SIZES), max_size=2)), min_size=2, max_size=7
    ),
    name=st.sampled_from(METHODS),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_prompts_is_answered_as_by_the_stock_loop(asked, prompts, rows, name):
    asked.prompts["any"] = prompts(*zip(*rows, strict=True))
    options = {"enabled": False} if name == "unpruned" else {"strategy": name}
    (stock, told), (tokens, run) = (answered(asked, "any", engine=engine, **options) for engine in ("eager", "graph"))
    assert torch.equal(tokens, stock)
    assert [(each.layer, each.before, each.after) for each in run.stages] == [
        (each.layer, each.before, each.after) for each in told.stages
    ]
    for ours, theirs in zip(run.stages, told.stages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))


@contextmanager
def compiling_for(asked, name):
    """Give a list of all that is compiled while the fast path answers with a strategy or unpruned."""
    compiled = []

    def compiler(graph, _):
        compiled.append(graph)
        return graph.forward

    options = {"enabled": False} if name == "unpruned" else {"strategy": name}
    with tracing(compiler), strategy.prune(asked.model, config(asked, **options)):
        yield compiled


@pytest.mark.parametrize("name", ["unpruned", "clse"])
def test_the_layers_are_compiled_for_all_sizes_at_once(asked, prompts, device, name):
    if device != "cpu":
        pytest.skip("there the same functions are compiled")
    with compiling_for(asked, name) as compiled:
        for size in (*SIZES, (308, 224), (196, 252)):
            answer(replace(asked, prompts={"one": prompts(QUESTIONS[:1], [[size]])}))
        known = len(compiled)
        for size in ((280, 196), (168, 308), (252, 140), (336, 196), (140, 336), (336, 168)):
            answer(replace(asked, prompts={"one": prompts(QUESTIONS[:1], [[size]])}))
    assert len(compiled) <= known + 2, "a length is not dynamic"


@pytest.mark.parametrize("name", ["unpruned", "clse"])
def test_so_they_are_for_all_batches_of_several_sizes(asked, prompts, device, name):
    if device != "cpu":
        pytest.skip("there the same functions are compiled")
    draw = random.Random(0)
    with compiling_for(asked, name) as compiled:
        for count in (3, 2, 4, 3, 5, 2, 4, 6):
            if count == 5:
                known = len(compiled)
            sizes = [[size] for size in draw.sample([*SIZES, (308, 224), (196, 252), (280, 196), (168, 308)], count)]
            answer(replace(asked, prompts={"one": prompts(QUESTIONS[:1] * count, sizes)}))
    assert len(compiled) <= known + 4, "a length or a number of prompts is not dynamic"


SHAPES = (((1, 8, 12),), ((1, 8, 8),) * 2, ((1, 8, 12), (1, 4, 4)), ((1, 12, 8), (1, 4, 4), (2, 8, 8)), ((1, 16, 16),))


@pytest.fixture
def tower(asked, device):
    """The vision tower, and calls of it with pictures of several sizes and a video."""
    module = asked.model.model.visual
    side, time = module.patch_embed.patch_size, module.patch_embed.temporal_patch_size
    draw = torch.Generator().manual_seed(0)

    def call(shapes):
        patches = sum(frames * height * width for frames, height, width in shapes)
        pixels = torch.randn(patches, 3 * time * side**2, generator=draw).to(device)
        return pixels, torch.tensor(shapes, device=device)

    return module, [call(shapes) for shapes in SHAPES]


def blocks(module):
    """The modules of a tower that come several times: its layers, and the mergers of some."""
    return [block for each in module.modules() if isinstance(each, nn.ModuleList) for block in each]


def features(output):
    return output if torch.is_tensor(output) else output[0]


@torch.no_grad()
def test_the_tower_sees_what_the_stock_one_sees_whatever_the_sizes(asked, tower, device):
    module, calls = tower
    stock = [features(module(*call)) for call in calls]
    with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)):
        seen = [features(module(*call)) for call in (*calls, *calls)]
    limit = 0 if device == "cpu" else 1e-5
    for ours, theirs in zip(seen, stock * 2, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_graphs_are_as_near_to_the_exact_features_as_the_stock_tower(asked, tower, device, dtype):
    if device == "cpu":
        pytest.skip("graphs are captured on a GPU")
    module, calls = tower
    exact, half = [features(module(*call)) for call in calls], copy.deepcopy(asked.model).to(dtype)

    def errors():
        return [
            (features(half.model.visual(*call)).float() - features_of_call).abs().max().item()
            for call, features_of_call in zip(calls, exact, strict=True)
        ]

    stock = errors()
    with strategy.prune(half, strategy.VTRConfig(engine="graph", enabled=False)):
        for _ in range(3):  # run, captured, replayed
            assert all(own <= 2 * its for own, its in zip(errors(), stock, strict=True))
        assert len(attachment_of(half).generator.decoder.graphs.captured("vision")) == len(calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["one", "several", "mixed", "text"])
def test_in_half_precision_unpruned_answers_are_those_of_the_stock_loop(asked, device, kind):
    if device == "cpu":
        pytest.skip("graphs are captured on a GPU")
    half = replace(asked, model=copy.deepcopy(asked.model).half())
    stock, _ = answered(half, kind, engine="eager", enabled=False)
    for _ in range(3):
        assert torch.equal(answered(half, kind, enabled=False)[0], stock)


def test_gradients_go_through_the_tower_as_through_the_stock_one(asked, tower):
    module, ((pixels, grid), *_) = tower

    def gradient():
        leaf = pixels.clone().requires_grad_()
        features(module(leaf, grid)).square().sum().backward()
        return leaf.grad

    stock = gradient()
    with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)):
        assert torch.equal(gradient(), stock)
    asked.model.zero_grad()


@torch.no_grad()
def test_a_layer_of_the_tower_is_compiled_once_for_all_sizes(asked, tower, monkeypatch):
    compiled, graphs = [], []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    def compile_here(function):
        compiled.append(function)
        return torch.compile(function, backend=compiler)

    torch.compiler.reset()  # forgets for which sizes other tests had the layers compiled
    monkeypatch.setattr("strategy.kernels.compile._compiled_between", cache(compile_here))
    module, calls = tower
    with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)):
        module(*calls[0])  # its operations are counted, which nothing is compiled for
        with compiling(True):
            for call in calls:
                module(*call)
    assert len(graphs) == len(compiled) == len({type(block) for block in blocks(module)})


@torch.no_grad()
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("options", [{"enabled": False}, {"strategy": "scope"}], ids=["unpruned", "looking"])
def test_what_other_sizes_cost_follows_from_the_first_ones(asked, tower, engine, options, monkeypatch):
    counters = []

    class Noted(MacCounter):
        def __init__(self):
            super().__init__()
            counters.append(self)

    monkeypatch.setattr("strategy.metrics.meter.MacCounter", Noted)
    module, calls = tower
    expected = []
    with strategy.prune(asked.model, strategy.VTRConfig(engine="eager", **options)):
        for call in calls:
            with MacCounter() as counter:
                module(*call)
            expected.append(counter.total)
    counters.clear()
    with strategy.prune(asked.model, strategy.VTRConfig(engine=engine, **options)) as run:
        for call, total in zip((*calls, *calls), (*expected, *expected), strict=True):
            before = run.multiply_adds["vision"]
            module(*call)
            assert run.multiply_adds["vision"] - before == total > 0
    assert len(counters) == 1, "operations are counted one by one once"


def test_a_tower_with_flash_attention_of_a_library_is_left_as_it_is(asked, tower, monkeypatch):
    module, _ = tower
    monkeypatch.setattr(module.config, "_attn_implementation", "flash_attention_2")
    with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)) as run:
        assert not [part for part in module.modules() if "forward" in vars(part)]
    assert run.graph_report() == f"1 x vision: stock modules ({FLASH_REASON})"


@torch.no_grad()
def test_a_tower_whose_arguments_have_no_names_is_counted_too(asked, tower, monkeypatch):
    module, (call, *_) = tower

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.dtype = module, module.dtype

        def forward(self, *args, **kwargs):
            return self.tower(*args, **kwargs)

    monkeypatch.setattr(type(strategy.backbone.find_backbone(asked.model)), "vision", lambda *_: [around])
    around = Around()
    with strategy.prune(asked.model, strategy.VTRConfig(engine="eager", enabled=False)) as run, MacCounter() as counter:
        around(call[0], grid_thw=call[1])
    assert run.multiply_adds["vision"] == counter.total > 0


@torch.no_grad()
def test_a_call_that_failed_and_was_made_again_is_counted_once(asked, tower, monkeypatch):
    module, calls = tower

    def fail(vision, tower, stock, *args, **kwargs):
        stock(*args, **kwargs)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with MacCounter() as counter:
        module(*calls[0])
    with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)) as run:
        monkeypatch.setattr(VisionGraphs, "usable", lambda vision, _: not vision.policy.unusable)
        monkeypatch.setattr(VisionGraphs, "forward", fail)
        with pytest.warns(UserWarning, match="memory is too small"):
            module(*calls[0])
    assert run.multiply_adds["vision"] == counter.total > 0


@pytest.mark.parametrize(
    ("engine", "implementation", "replaced"),
    [
        ("auto", "sdpa", "on a GPU"),
        ("eager", "sdpa", ""),
        ("graph", "sdpa", "everywhere"),
        ("graph", "eager", "everywhere"),
        ("graph", "own", ""),
    ],
)
def test_the_attention_of_a_tower_is_replaced_where_the_engine_answers(
    asked, tower, device, engine, implementation, replaced, monkeypatch
):
    module, _ = tower
    monkeypatch.setattr(module.config, "_attn_implementation", implementation)
    with strategy.prune(asked.model, strategy.VTRConfig(engine=engine, enabled=False)):
        found = ["forward" in vars(block.attn) for block in module.blocks]
    assert {*found} == {replaced == "everywhere" or (replaced == "on a GPU" and device != "cpu")}
    assert not any("forward" in vars(block.attn) for block in module.blocks)


@torch.no_grad()
def test_under_autocast_a_tower_attends_in_the_type_of_its_projection(asked, tower, device, monkeypatch):
    module, types = tower[0], set()

    def noted(*tensors):
        types.update(tensor.dtype for tensor in tensors[:3])
        return packed_attention(*tensors)

    monkeypatch.setattr("strategy.kernels.tower_attention.packed_attention", noted)
    attention, heads = module.blocks[0].attn, module.config.num_heads
    # A GPU's autocast leaves the norm in front in float32.
    hidden = torch.randn(12, attention.qkv.in_features, device=device)
    tables = [torch.randn(12, attention.qkv.in_features // heads, device=device) for _ in range(2)]
    call = {"cu_seqlens": torch.tensor([0, 8, 12], dtype=torch.int32), "position_embeddings": tables}
    with torch.autocast(device, torch.bfloat16):
        stock = attention(hidden, **call)
        with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)):
            seen = attention(hidden, **call)
    assert types == {torch.bfloat16}
    assert seen.dtype == stock.dtype
    torch.testing.assert_close(seen, stock, rtol=0.02, atol=0.02)
