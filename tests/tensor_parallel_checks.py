"""What tensor parallelism owes every backbone: the tokens kept and the answers of one process.

A backbone's tests import everything from here and give a fixture `parted`, what `part` makes of `work` in a number of
processes, which are started once and go through all that is asked of them.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings, simplefilter

import pytest
import torch
from fast_checks import Asked, same_means, tracing
from matrix import ENCODED, FULL, KINDS, cells
from several import Build, Ran, run, same
from torch import Tensor

from strategy import registry
from strategy.distributed import collectives, tensor_parallel
from strategy.evaluation.requests import PADDING_MARK, pool_requests
from strategy.graph.cuda_graphs import CudaGraphCache, ProgramKey
from strategy.pruning import stage

pytestmark = pytest.mark.processes
ENGINES = ("eager", "graph")
UNLIKE = KINDS if FULL else ("one", "mixed")  # what ranks are asked that would choose differently


@dataclass
class Request:
    """What pooling needs of lmms-eval's requests."""

    task_name: str
    arguments: tuple[Any, ...]
    metadata: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


def finer_than_its_weights(model: Any) -> Any:
    """A copy whose weights, but not its buffers, are in half precision."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.bfloat16()
    return other


def mine() -> None:
    """A function in a request: each process has its own."""


def asked_for(number: int) -> Request:
    """The n-th of five requests, of which the last one only evens out the ranks."""
    return Request("task", (f"question {number}", mine, number), {PADDING_MARK: number == 4})


def pools(rank: int, ranks: int, group: Any) -> dict[str, Any]:
    requests = [asked_for(number) for number in range(rank, 5, ranks)]
    pool, own = pool_requests(requests, group)
    with pytest.raises(ValueError, match="task 'task' has fewer questions than"):
        pool_requests(requests if rank else [], group)
    return {"pool": pool, "own": pool[own] == requests}


def work(rank: int, ranks: int, build: Build) -> dict[str, Any]:
    """What one of several processes does."""
    asked = build("cpu")
    half = finer_than_its_weights(asked.model)
    before = {name: buffer.clone() for name, buffer in half.named_buffers()}
    tensor_parallel.split(half, half.get_decoder(), ranks)
    group = tensor_parallel.split(asked.model, asked.model.get_decoder(), ranks)
    found = {way: run(asked, asked.names, way) for way in ENGINES} | pools(rank, ranks, group)
    found["buffers"] = all(torch.equal(buffer.cpu(), before[name]) for name, buffer in half.named_buffers())
    heads = torch.arange(4, device=asked.model.device).view(2, 2, 1) + 4 * rank
    found["heads"] = collectives.all_gather_heads(heads, group).cpu()
    as_it_is = {"all_gather_heads": lambda own, group: own, "broadcast_first": lambda own, group: own}
    with patch.multiple(stage, **as_it_is):
        found["alone"] = run(asked, ["clse"], kinds=["mixed"])
    found |= {f"{way} unlike": unlike(asked, rank, way) for way in ENGINES}
    found["least"] = collectives.all_reduce_min([rank, -rank, 7], asked.model.device, group)
    found["failing"] = fails_alone(rank, asked.model.device, group)
    full = patch.object(CudaGraphCache, "run", side_effect=torch.cuda.OutOfMemoryError("full"))
    with full, pytest.raises(RuntimeError, match=r"engine=graph: full; .* engine=eager"):
        run(asked, ["clse"], "graph", ["one"])
    with pytest.raises(ValueError, match="is split already"):
        tensor_parallel.split(asked.model, asked.model.get_decoder(), ranks)
    if asked.model.device.type == "cpu":  # a GPU's are fused by themselves
        with tracing():
            names, kinds = (["unpruned", "clse"], KINDS) if FULL else (["clse"], ["several"])
            found["traced"] = run(asked, names, "graph", kinds)
    return found


def unlike(asked: Asked, rank: int, engine: str) -> Ran:
    """What is answered where all ranks but the first score otherwise, and have other logits by graph."""
    score, head = registry.get("clse").score, asked.model.get_output_embeddings()
    other, forward = patch.object(registry.get("clse"), "score", lambda *a: -score(*a)), head.forward
    logits = patch.object(head, "forward", lambda x: -forward(x) if rank and engine == "graph" else forward(x))
    with other if rank else nullcontext(), logits:
        return run(asked, ["clse"], engine, UNLIKE)


def fails_alone(rank: int, device: torch.device, group: Any) -> tuple[Tensor, list[str]]:
    """What a program gives that cannot be captured on one rank only, and which are captured in the end."""
    graphs, given = CudaGraphCache(device, group=group), torch.ones(3, device=device)
    programs = {"waits": lambda x: x * x.sum().item() if rank else x * x.sum(), "runs": lambda x: 3 * x}
    with catch_warnings():
        simplefilter("ignore")
        given = [graphs.run(ProgramKey(name), program, [given]) for name, program in programs.items() for _ in range(3)]
    return torch.stack(given).cpu(), [key.kind for key in graphs.graphs]


@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_keep_and_answer_what_one_process_does(parted, engine):
    # Left out are those that look at a tower which the backbone does not describe.
    assert {name for name, _ in set(cells(parted.names)) - set(parted.whole.kept)} <= set(ENCODED)
    for name, kind in parted.whole.kept:
        assert bool(parted.whole.kept[name, kind]) == (name != "unpruned")
        for number, rank in enumerate(parted.ranks):
            assert same(rank[engine], parted.whole, name, kind), f"rank {number}: {name}, {kind}"


def test_what_is_fused_of_a_split_model_can_be_traced_whole(parted):
    for rank in parted.ranks:
        for name, kind in rank["traced"].answers if "traced" in rank else ():
            assert same(rank["traced"], parted.whole, name, kind)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_rank_chooses_for_all(parted, engine):
    for rank in parted.ranks:
        assert all(same(rank[f"{engine} unlike"], parted.whole, "clse", kind) for kind in UNLIKE)


def test_a_rank_decides_as_the_others_do(parted):
    ranks = parted.ranks
    assert all(rank["least"] == [0, 1 - len(ranks), 7] for rank in ranks)
    for rank in ranks:
        given, captured = rank["failing"]
        assert (given == 3).all()
        assert captured == (["runs"] if torch.cuda.device_count() >= len(ranks) else [])


def test_by_their_own_heads_alone_ranks_would_keep_different_tokens(parted):
    def kept(ran: Ran) -> list[Tensor]:
        return [tokens for stage in ran.kept["clse", "mixed"] for tokens in stage]

    first, *others = [kept(rank["alone"]) for rank in parted.ranks]
    for other in (kept(parted.whole), *others):
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_record_counts_a_ranks_own_share(parted):
    for which, whole in parted.whole.means.items():
        own = [rank["eager"].means[which] for rank in parted.ranks]
        for part in ("prefill", "decode"):
            costs = [each["multiply_adds"][part] for each in own]
            assert max(costs) < whole["multiply_adds"][part]
        assert sum(each["multiply_adds"]["prefill"] for each in own) == whole["multiply_adds"]["prefill"]
        assert sum(each["cache_bytes"] for each in own) == whole["cache_bytes"]
        for each in own:
            assert each["multiply_adds"]["vision"] == whole["multiply_adds"]["vision"]
            assert each["multiply_adds"]["head"] == whole["multiply_adds"]["head"]
            assert (each["kept_tokens"], each["cache_length"]) == (whole["kept_tokens"], whole["cache_length"])


def test_the_fast_path_counts_as_the_stock_loop_does(parted):
    for rank in parted.ranks:
        for (name, kind), means in rank["eager"].means.items():
            same_means(rank["graph"].means[name, kind], means, kind)


def test_heads_come_in_the_order_of_ranks(parted):
    count = len(parted.ranks)
    expected = torch.cat([torch.arange(4).view(2, 2, 1) + 4 * rank for rank in range(count)], dim=1)
    assert all(torch.equal(rank["heads"], expected) for rank in parted.ranks)


def test_each_rank_answers_the_requests_to_all(parted):
    count = len(parted.ranks)
    order = [number for rank in range(count) for number in range(rank, 5, count)]
    for rank in parted.ranks:
        assert rank["own"]
        assert rank["pool"] == [asked_for(number) for number in order]


def test_splitting_leaves_rotary_tables_as_fine_as_they_are(parted):
    assert all(rank["buffers"] for rank in parted.ranks)


def test_what_cannot_be_split_is_told_what_could_be(parted, monkeypatch):
    text = parted.decoder.config
    heads, keys = text.num_attention_heads, text.num_key_value_heads
    monkeypatch.setenv("WORLD_SIZE", "10")
    with pytest.raises(ValueError, match="tensor_parallel='two': allowed is a whole number from 1 up"):
        tensor_parallel.parse_tp_size("two")
    with pytest.raises(ValueError, match="tensor_parallel=3: want 3 processes started together"):
        tensor_parallel.parse_tp_size("3")
    assert tensor_parallel.parse_tp_size("5") == 5
    words = f"tensor_parallel=5: {heads} attention heads and {keys} key heads .* 1, 2.* and of these 1, 2 fit the 10"
    with pytest.raises(ValueError, match=words):
        tensor_parallel.split(parted.decoder, parted.decoder, 5)
