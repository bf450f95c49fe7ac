"""What ZeRO stage 3 owes every backbone: the tokens kept, the answers and the record of one process.

A backbone's tests import everything from here and give a fixture `sharded`, what `part` makes of `work` in a number of
processes, which are started once and go through all that is asked of them.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from fast_checks import config
from matrix import ENCODED, cells
from several import Build, run, same

import strategy
from strategy.distributed import zero

pytestmark = pytest.mark.processes


def asked_of(rank: int, ranks: int, names: Sequence[str]) -> list[Sequence[str]]:
    """What each process is asked in turns: all, every third the other way round, or nothing; then only the last one."""
    last = rank == ranks - 1
    first = [] if last else names if rank == 0 else names[::-3]
    return [first, ["clse"] if last else []]


def held(weights: list[Any]) -> int:
    """Elements of weights that lie in this process's memory, in their places or as its share of them."""
    return sum(weight.untyped_storage().nbytes() // weight.itemsize + len(weight.ds_tensor) for weight in weights)


def work(rank: int, ranks: int, build: Build) -> dict[str, Any]:
    """What one of several processes does."""
    asked = build("cpu")
    decoder = asked.model.get_decoder()
    shards, weights = zero.shard(asked.model, decoder), list(decoder.layers.parameters())
    found: dict[str, Any] = {"ran": [], "held": [held(weights)]}
    for names in asked_of(rank, ranks, asked.names):
        with zero.lockstep(shards):
            found["ran"].append(run(asked, names))
        found["held"].append(held(weights))
    with pytest.raises(ValueError, match=r"engine=graph: .* sharded .* cannot be fused"):
        strategy.attach(asked.model, config(asked))
    return found


def rounds(sharded: Any) -> list[tuple[Any, Sequence[str]]]:
    """What each process ran, and of which strategies, in each turn."""
    count = len(sharded.ranks)
    return [
        pair
        for rank, found in enumerate(sharded.ranks)
        for pair in zip(found["ran"], asked_of(rank, count, sharded.names), strict=True)
    ]


def test_each_rank_keeps_and_answers_what_one_process_does(sharded):
    # Left out are those that look at a tower which the backbone does not describe.
    assert {name for name, _ in set(cells(sharded.names)) - set(sharded.whole.kept)} <= set(ENCODED)
    for name, kind in sharded.whole.kept:
        ran = [each for each, names in rounds(sharded) if name in names]
        assert ran
        assert all(same(each, sharded.whole, name, kind) for each in ran), f"{name}, {kind}"


def test_the_record_is_that_of_one_process(sharded):
    for ran, names in rounds(sharded):
        assert list(ran.means) == [cell for cell in cells(names) if cell in sharded.whole.means]
        for which, means in ran.means.items():
            assert means | {"seconds": None} == sharded.whole.means[which] | {"seconds": None}


def test_between_passes_each_rank_holds_its_share_of_the_layers(sharded):
    weights = list(sharded.decoder.layers.parameters())
    share = sum(-(-weight.numel() // len(sharded.ranks)) for weight in weights)
    assert all(each == share for rank in sharded.ranks for each in rank["held"])


def test_other_stages_and_what_does_not_go_with_it_are_refused(monkeypatch):
    assert (zero.parse_zero_stage(0, 2), zero.parse_zero_stage("0", 1)) == (False, False)
    with pytest.raises(ValueError, match=r"zero_stage=2: allowed are 0, off, and 3, which shards"):
        zero.parse_zero_stage(2, 1)
    with pytest.raises(ValueError, match=r"zero_stage=3 and tensor_parallel=2: give one of the two"):
        zero.parse_zero_stage(3, 2)
    with pytest.raises(ValueError, match=r"zero_stage=3: want several processes started together, not 1: `accelerate"):
        zero.parse_zero_stage("3", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert zero.parse_zero_stage("3", 1)
