"""What the fast path owes every backbone: the answers of the stock loop, on the CPU and where there is a GPU.

A backbone's tests import everything from here and give a fixture `asked`, an `Asked` on the fixture `device`.
"""

import copy
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from matrix import BARE, ENCODED, FIRST, FULL, KINDS, cells, runs_on
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import strategy
from strategy import VTRConfig
from strategy.attach import attachment_of
from strategy.backbone import Backbone, find_backbone
from strategy.distributed.watchdog import PassLostError
from strategy.graph import batch_prefill, decoder, generator, packed_prefill, static_cache
from strategy.graph.cuda_graphs import CudaGraphCache
from strategy.graph.fallback import FallbackPolicy
from strategy.kernels import llama_layer
from strategy.kernels.compile import compiled, compiling
from strategy.kernels.layer_check import try_layers


@dataclass
class Asked:
    """A small trained model, and prompts as the arguments of its `generate`.

    one: a single prompt. several: of different lengths, with pictures or videos alike. mixed: with different ones or
    none beside each other. text: without any. names: the strategies tried of what each does alike on all backbones.
    """

    model: Any
    prompts: dict[str, dict[str, Any]]
    budget: dict[str, Any]
    names: Sequence[str] = ()


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, or the last GPU: where there are several, one that is not the current one."""
    if request.param == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return f"cuda:{torch.cuda.device_count() - 1}"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the decoder's programs of the fast path were asked for."""
    counts: Counter[str] = Counter()
    run = CudaGraphCache.run

    def counted(self: CudaGraphCache, key: Any, *args: Any, **call: Any) -> Any:
        if key.kind != "vision":  # which is the fast path's on a GPU whoever makes the answer
            counts[key.kind] += 1
        return run(self, key, *args, **call)

    def packed(*args: Any) -> Any:
        counts["prefill"] += 1
        return packed_prefill.prefill_packed(*args)

    monkeypatch.setattr(CudaGraphCache, "run", counted)
    monkeypatch.setattr(batch_prefill, "prefill_packed", packed)
    return counts


def config(asked: Asked, **given: Any) -> VTRConfig:
    return VTRConfig(**asked.budget | {"engine": "graph"} | given)


def answer(asked: Asked, kind: str = "one", new: int = 12, **more: Any) -> Any:
    return asked.model.generate(**asked.prompts[kind], **{"do_sample": False, "max_new_tokens": new} | more)


def answered(asked: Asked, kind: str, times: int = 1, **given: Any) -> tuple[Any, strategy.RunRecord]:
    with strategy.prune(asked.model, config(asked, **given)) as run:
        for _ in range(times):
            tokens = answer(asked, kind)
    return tokens, run


def same_record(mine: strategy.RunRecord, stock: strategy.RunRecord, kind: str) -> None:
    for ours, theirs in zip(mine.stages, stock.stages, strict=True):
        assert (ours.layer, ours.before, ours.after) == (theirs.layer, theirs.before, theirs.after)
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))
    same_means(mine.means(), stock.means(), kind)


def same_means(own: dict[str, Any], its: dict[str, Any], kind: str) -> None:
    """Check the means of a record of the fast path against those of the stock loop's."""
    assert own["multiply_adds"]["vision"] == its["multiply_adds"]["vision"]
    if kind in ("one", "text"):
        assert own["cache_bytes"] == its["cache_bytes"]
        assert own["multiply_adds"]["decode"] == its["multiply_adds"]["decode"]
    else:  # the stock loop's cache holds the padding of the shorter prompts too
        assert own["cache_bytes"] <= its["cache_bytes"]
        assert own["multiply_adds"]["decode"] <= its["multiply_adds"]["decode"]
    if kind == "mixed":  # prompts with the same grids have no padding but their own
        assert own["cache_length"] <= its["cache_length"]
    else:
        assert own["cache_length"] == its["cache_length"]
        assert own["multiply_adds"]["prefill"] >= its["multiply_adds"]["prefill"]
    assert bool(own["multiply_adds"]["scoring"]) == bool(its["multiply_adds"]["scoring"])
    for name in set(own) - {"multiply_adds", "seconds", "cache_bytes", "cache_length"}:
        assert own[name] == its[name], name


# The stock loop prefills prompts of other kinds than these, and does it alike whatever the strategy.
GRAPHED = ("one", "several", "mixed")
# Which of tokens that are alike these two keep turns on rounding, and layers that are fused on a GPU round otherwise.
ROUNDED = ("cdpruner", "vispruner")


def same_as_the_stock_loop(asked: Asked, ran: Counter[str], device: str, name: str, kind: str) -> None:
    """Check what the fast path answers and records."""
    if kind not in asked.prompts:
        pytest.skip("this backbone has no such prompts")
    given = {"enabled": False} if name == "unpruned" else {"strategy": name}
    # On a GPU run, then captured, then replayed.
    times = 3 if device != "cpu" else 1
    stock, told = answered(asked, kind, times, engine="eager", **given)
    assert not ran
    tokens, run = answered(asked, kind, times, **given)
    if device != "cpu" and name in ROUNDED:
        assert [(each.before, each.after) for each in run.stages] == [(each.before, each.after) for each in told.stages]
    else:
        assert torch.equal(tokens, stock)
        same_record(run, told, kind)
    assert bool(ran["prefill"]) == (kind in GRAPHED)
    assert ran["decode"] or not told.decoded, "an answer may end with its first token"


@pytest.mark.parametrize("kind", [*KINDS, "text"])
@pytest.mark.parametrize("name", FIRST)
def test_answers_and_records_are_those_of_the_stock_loop(asked, ran, device, name, kind):
    same_as_the_stock_loop(asked, ran, device, name, kind)


def same_on_every_kind(asked: Asked, ran: Counter[str], device: str, name: str) -> None:
    for kind in (*KINDS, "text") if FULL else GRAPHED:
        if kind in asked.prompts:
            ran.clear()
            same_as_the_stock_loop(asked, ran, device, name, kind)


@pytest.mark.shared
@pytest.mark.parametrize("name", [name for name in BARE if name not in FIRST])
def test_so_they_are_for_every_strategy(asked, ran, device, name):
    same_on_every_kind(asked, ran, device, name)


@pytest.mark.shared
@pytest.mark.parametrize("name", ENCODED)
def test_what_looks_at_a_vision_tower_answers_so_or_is_refused_by_name(asked, ran, device, name):
    if runs_on(asked.model, name):
        return same_on_every_kind(asked, ran, device, name)
    family = find_backbone(asked.model).name
    with pytest.raises(ValueError, match=rf"^{name} looks at .*, but the backbone {family} describes none of this"):
        strategy.attach(asked.model, config(asked, strategy=name))
    assert not hasattr(asked.model, "_vtr_attachment")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("text", "prefill: stock prefill (no prompt has visual tokens)"),
        ("mixed", "prefill: packed, without a graph (the prompts show pictures of several sizes)"),
    ],
)
def test_the_record_and_the_log_say_why_a_program_was_not_used(asked, caplog, kind, line):
    if kind not in asked.prompts:
        pytest.skip("this backbone has no such prompts")
    with caplog.at_level("INFO", "strategy.graph"):
        _, run = answered(asked, kind, 2)
    assert f"2 x {line}" in run.graph_report().splitlines()
    assert [record.getMessage() for record in caplog.records if record.name == "strategy.graph"].count(line) == 1


@contextmanager
def tracing(backend: Any = "aot_eager") -> Iterator[None]:
    """What is fused on a GPU is traced as it is there, and its operations run one by one, or as a backend has them."""
    traced = patch.object(torch, "compile", partial(torch.compile, backend=backend))
    compiled.cache_clear()
    try:
        with (
            traced,
            patch.object(FallbackPolicy, "compiling", lambda self, what, device, wanted=True: compiling(wanted)),
        ):
            yield
    finally:
        compiled.cache_clear()
        torch._dynamo.reset()


@pytest.fixture
def traced() -> Iterator[None]:
    with tracing():
        yield


def test_what_is_fused_can_be_traced_whole_and_answers_the_same(asked, traced, device):
    if device != "cpu":
        pytest.skip("there it is fused in the other tests")
    for name, prompts in cells(asked.names):
        if not runs_on(asked.model, name):
            continue
        given = {"enabled": False} if name == "unpruned" else {"strategy": name}
        stock, told = answered(asked, prompts, engine="eager", **given)
        # What scores is counted the first time and fused the second.
        tokens, run = answered(asked, prompts, 2, **given)
        assert torch.equal(tokens, stock), given
        for ours, theirs in zip(run.stages, told.stages, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("kind", GRAPHED)
def test_a_decode_step_may_leave_its_attention_to_the_kernel(asked, device, kind, trace, monkeypatch):
    if device != "cpu":
        pytest.skip("there the kernel itself attends in half precision")
    if kind not in asked.prompts:
        pytest.skip("this backbone has no such prompts")

    def attend(query, keys, values, slot, scale):
        seen = torch.arange(keys.shape[2]) <= slot[:, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None, None], scale=scale)

    stock, _ = answered(asked, kind, engine="eager")
    monkeypatch.setattr(decoder, "kernel_takes", lambda keys, shared_by: True)
    monkeypatch.setattr(llama_layer, "decode_attention", attend)
    with tracing() if trace else nullcontext():
        assert torch.equal(answered(asked, kind, 2)[0], stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layers_of_the_backbone_are_fused_in_every_type(asked, dtype):
    model = copy.deepcopy(asked.model).to(dtype)
    family = find_backbone(model)
    decoder = family.decoder(model)
    specs = family.layer_specs(decoder)
    assert try_layers(decoder, specs, family, fused=True) == (specs, None)
    with strategy.prune(model, config(asked)):
        assert attachment_of(model).generator.policy.unusable is None


def test_left_to_itself_a_cpu_answers_with_the_stock_loop_and_a_gpu_fast(asked, ran, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answered(asked, "one", engine="auto")
    assert bool(ran["prefill"]) == (device != "cpu")


def test_long_answers_outgrow_their_cache(asked, monkeypatch):
    with strategy.prune(asked.model, config(asked, engine="eager")):
        stock = answer(asked, "several", 40, eos_token_id=None)
    monkeypatch.setattr(generator, "DECODE_CHUNK", 3)
    monkeypatch.setattr(decoder, "DECODE_CHUNK", 3)
    monkeypatch.setattr(static_cache, "LENGTH_MULTIPLE", 4)
    with strategy.prune(asked.model, config(asked)):
        for _ in range(2):
            assert torch.equal(answer(asked, "several", 40, eos_token_id=None), stock)


@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_what_an_earlier_answer_left_in_a_cache_changes_nothing(asked, monkeypatch, kind):
    if kind not in asked.prompts:
        pytest.skip("this backbone has no such prompts")
    stock, _ = answered(asked, kind, engine="eager")
    create = static_cache.StaticKVCache.__init__

    def left(self: Any, *args: Any) -> None:
        create(self, *args)
        for tensor in chain(*self.layers):
            tensor.fill_(torch.nan)

    monkeypatch.setattr(static_cache.StaticKVCache, "__init__", left)
    tokens, _ = answered(asked, kind)
    assert torch.equal(tokens, stock)


UNFIT = {
    "logits processors": {"min_new_tokens": 4},
    "such as scores": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("words", UNFIT)
def test_what_the_fast_path_cannot_do_is_left_to_the_stock_loop_and_said_once(asked, ran, words):
    with strategy.prune(asked.model, config(asked, engine="eager")):
        stock = answer(asked, **UNFIT[words])
    with strategy.prune(asked.model, config(asked)):
        with pytest.warns(UserWarning, match=words):
            tokens = answer(asked, **UNFIT[words])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            answer(asked, **UNFIT[words])
    assert not ran
    tokens, stock = (each if torch.is_tensor(each) else each.sequences for each in (tokens, stock))
    assert torch.equal(tokens, stock)


@pytest.mark.parametrize("more", [{"do_sample": True}, {"num_beams": 2}])
def test_sampling_and_beams_are_the_stock_models(asked, ran, more):
    with strategy.prune(asked.model, config(asked, engine="eager")):
        torch.manual_seed(0)
        stock = answer(asked, **more)
    with strategy.prune(asked.model, config(asked)):
        torch.manual_seed(0)
        assert torch.equal(answer(asked, **more), stock)
    assert not ran


def test_hooks_of_others_are_respected(asked, ran):
    seen = []
    handle = asked.model.get_decoder().layers[1].register_forward_hook(lambda *_: seen.append(1))
    try:
        with strategy.prune(asked.model, config(asked)), pytest.warns(UserWarning, match="hooks"):
            answer(asked)
    finally:
        handle.remove()
    assert seen
    assert not ran


def test_a_decoder_spread_over_devices_is_answered_by_the_stock_loop(asked):
    spread = copy.deepcopy(asked.model)
    spread.get_decoder().layers[-1].to("meta")
    with pytest.raises(ValueError, match="engine=graph: a decoder with weights of several types or devices"):
        strategy.attach(spread, config(asked))
    before = set(vars(spread))
    with strategy.prune(spread, config(asked, engine="auto")):
        assert attachment_of(spread).generator.policy.blocker
    assert set(vars(spread)) == before


def test_afterwards_the_model_is_the_stock_one(asked):
    before = {name: (id(p), p.clone()) for name, p in asked.model.named_parameters()}
    modules = {name: set(vars(module)) for name, module in asked.model.named_modules()}
    answered(asked, "one", 3)
    assert {name: set(vars(module)) for name, module in asked.model.named_modules()} == modules
    for name, parameter in asked.model.named_parameters():
        identity, values = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, values)
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_a_model_is_detached_even_if_there_is_no_memory_to_part_its_layers(asked, monkeypatch):
    stock, _ = answered(asked, "one", engine="eager")
    modules = {name: set(vars(module)) for name, module in asked.model.named_modules()}
    with monkeypatch.context() as context:
        context.setattr(llama_layer, "unpack_projections", Mock(side_effect=torch.cuda.OutOfMemoryError("none left")))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            answered(asked, "one")
    assert {name: set(vars(module)) for name, module in asked.model.named_modules()} == modules
    assert torch.equal(answered(asked, "one")[0], stock)


@pytest.mark.parametrize("fails", [True, False])
def test_what_is_merged_is_let_go_of_before_it_is_parted(asked, monkeypatch, fails):
    """Else the memory of all layers would be needed twice for a while."""
    pack, unpack, whole, left = llama_layer.pack_projections, llama_layer.unpack_projections, [], []

    def watched(layers: Any, specs: Any) -> Any:
        weights = pack(layers, specs)
        whole.extend(weakref.ref(tensor) for each in weights for tensor in (each.qkv, each.gate_up))
        return weights

    def counted(layers: Any) -> Iterator[Any]:
        left.append(sum(each() is not None for each in whole))
        yield from layers

    def unpacked(layers: Any, specs: Any, weights: Any) -> None:
        unpack(counted(layers), specs, weights)

    monkeypatch.setattr(llama_layer, "pack_projections", watched)
    monkeypatch.setattr(llama_layer, "unpack_projections", unpacked)
    if fails:
        failing(monkeypatch, torch.cuda.OutOfMemoryError("none left"), 1)
        with pytest.warns(UserWarning, match="memory"):
            answered(asked, "one")
    else:
        answered(asked, "one", 3)
    assert whole
    assert left == [0]


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_answer_at_once(asked, in_place):
    attention = asked.model.get_decoder().layers[2].self_attn.v_proj.weight
    kept = attention.detach().clone()
    try:
        with strategy.prune(asked.model, config(asked)):
            for _ in range(3):
                answer(asked)
            with torch.no_grad():
                if in_place:
                    attention.mul_(-1)
                else:
                    attention.data = -kept
            changed = answer(asked)
        with strategy.prune(asked.model, config(asked, engine="eager")):
            assert torch.equal(changed, answer(asked))
    finally:
        attention.data = kept


def test_a_copy_of_an_attached_model_answers_by_itself(asked, ran):
    with strategy.prune(asked.model, config(asked)):
        tokens = answer(asked)
        other = copy.deepcopy(asked.model)
    ran.clear()
    assert torch.equal(answer(Asked(other, asked.prompts, {})), tokens)
    assert ran["prefill"] == 1
    strategy.detach(other)


def test_threads_take_turns(asked):
    stock = {kind: answered(asked, kind, engine="eager")[0] for kind in ("one", "several")}
    found: dict[str, Any] = {}
    with strategy.prune(asked.model, config(asked)):
        threads = [
            threading.Thread(target=lambda kind=kind: found.update({kind: [answer(asked, kind) for _ in range(3)]}))
            for kind in stock
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for kind, tokens in stock.items():
        assert all(torch.equal(each, tokens) for each in found[kind])


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
    run, left = CudaGraphCache.run, [times]

    def fails(self: CudaGraphCache, key: Any, *args: Any, **call: Any) -> Any:
        if key.kind == "decode" and left[0]:
            left[0] -= 1
            raise error
        return run(self, key, *args, **call)

    monkeypatch.setattr(CudaGraphCache, "run", fails)


def test_without_memory_for_graphs_the_stock_loop_answers_and_says_so_once(asked, monkeypatch):
    stock, told = answered(asked, "one", engine="eager")
    failing(monkeypatch, torch.cuda.OutOfMemoryError("none left"), 9)
    with strategy.prune(asked.model, config(asked)) as run:
        with pytest.warns(UserWarning, match="memory") as said:
            assert torch.equal(answer(asked), stock)
        assert len(said) == 1
        own, its = run.means(), told.means()
        assert all(own[name] == its[name] for name in own if name != "seconds")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(answer(asked), stock)


@pytest.mark.parametrize("error", [TorchDynamoException, FailOnRecompileLimitHit])
def test_what_cannot_be_compiled_runs_unfused(asked, error, monkeypatch):
    stock, _ = answered(asked, "one", engine="eager")
    failure = error("a hard failure")
    failure.__cause__ = RuntimeError("no compiler")
    failing(monkeypatch, failure, 1)
    with strategy.prune(asked.model, config(asked)) as run, pytest.warns(UserWarning, match="not fused.+no compiler"):
        assert torch.equal(answer(asked), stock)
    assert run.prompts == 1


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("none left"), TorchDynamoException("no compiler")])
def test_where_other_ranks_wait_in_the_pass_that_failed_nothing_else_answers(asked, error, monkeypatch):
    failing(monkeypatch, error, 1)
    monkeypatch.setattr("strategy.graph.fallback.tp_group_of", lambda layers: object())
    with strategy.prune(asked.model, config(asked)), pytest.raises(PassLostError, match=f"{error}.+engine=eager"):
        answer(asked)


def test_a_model_whose_parts_lie_on_several_devices_is_not_fused(asked):
    model = copy.deepcopy(asked.model)
    model.get_output_embeddings().to("meta")
    with pytest.raises(ValueError, match="engine=graph: a model whose parts lie on several devices cannot be fused"):
        strategy.attach(model, config(asked))


def test_any_other_failure_is_the_callers_and_leaves_nothing_behind(asked, monkeypatch):
    stock, _ = answered(asked, "one", engine="eager")
    with monkeypatch.context() as context:
        failing(context, KeyboardInterrupt(), 1)
        with strategy.prune(asked.model, config(asked)):
            with pytest.raises(KeyboardInterrupt):
                answer(asked)
            assert torch.equal(answer(asked), stock)


def test_a_bare_decoder_is_run_by_its_caller(asked):
    bare = asked.model.get_decoder()
    with pytest.warns(UserWarning, match="with the eager engine, since a bare decoder does not generate") as said:
        run = strategy.attach(bare, config(asked), backbone=find_backbone(asked.model, None).name, layout=[[]])
    assert attachment_of(bare).generator is None
    strategy.detach(bare)
    assert len(said) == 1
    assert run.graph_report() == "1 x answer: stock loop (a bare decoder does not generate)"


@pytest.mark.parametrize("why", ["watch", "loop"])
def test_a_model_that_the_graph_engine_never_answers_says_why_once(asked, ran, monkeypatch, why):
    stock, _ = answered(asked, "one", engine="eager")
    family, watch = find_backbone(asked.model), None
    if why == "watch":
        watch, reason = (lambda *_: None), "watch= sees stock layers only"
    else:
        monkeypatch.setattr(type(family), "greedy_loop", Backbone.greedy_loop)
        reason = f"the backbone {family.name} replaces no loop of generate (greedy_loop)"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        run = strategy.attach(asked.model, config(asked), watch=watch)
        assert torch.equal(answer(asked), stock)
        assert torch.equal(answer(asked), stock)
    strategy.detach(asked.model)
    own = [text for text in (str(each.message) for each in said) if text.startswith("engine=")]
    assert own == [f"engine=graph: answering with the eager engine, since {reason}"]
    assert not ran
    # On a GPU, the vision modules may have graphs of their own.
    answers = [line for line in run.graph_report().splitlines() if " x answer: " in line]
    assert answers == [f"1 x answer: stock loop ({reason})"]


def test_an_engine_that_nobody_asked_for_is_not_missed(asked, device):
    if device != "cpu":
        pytest.skip("there it is asked for by default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in ("auto", "eager"):
            run = strategy.attach(asked.model, config(asked, engine=engine), watch=lambda *_: None)
            strategy.detach(asked.model)
            assert not run.graph_report()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_graphs_are_bounded_and_go_with_the_engine(asked, device):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    with strategy.prune(asked.model, config(asked)):
        tokens = [answer(asked) for _ in range(3)]
        graphs = attachment_of(asked.model).generator.decoder.graphs
        assert graphs.captured("prefill")
        assert graphs.captured("decode")
        graphs.limit = graphs.size - 1
        for _ in range(3):
            tokens += [answer(asked, "several")]
        assert graphs.size <= graphs.limit
        assert all(torch.equal(each, tokens[0]) for each in tokens[:3])
        assert all(torch.equal(each, tokens[3]) for each in tokens[3:])
    del graphs, tokens
    torch.cuda.synchronize(device)
    assert torch.cuda.memory_allocated(device) <= before + (1 << 20)


def test_what_the_decoder_did_for_a_refused_prompt_counts_nowhere(asked: Asked) -> None:
    spoilt = tree_map(
        lambda value: value * torch.nan if torch.is_tensor(value) and value.is_floating_point() else value,
        asked.prompts["one"],
    )
    with strategy.prune(asked.model, config(asked)) as run:
        answer(asked, "one")
        before = {part: run.multiply_adds[part] for part in ("prefill", "scoring", "head", "decode")}
        with pytest.raises(ValueError, match="are not finite"):
            asked.model.generate(**spoilt, do_sample=False, max_new_tokens=4)
        assert {part: run.multiply_adds[part] for part in before} == before
        assert run.prompts == 1
