"""Greedy answers of the graph engine, on the CPU: those of the stock loop, or the reason why not."""

import pytest
import torch
from current_models import FAMILIES
from test_model import CASES, config

import strategy
from strategy import VTRConfig

# The families whose layers the fused ones cannot express, with the reason.
BLOCKED = {
    "qwen3_vl_moe": "without plain linear projections",
    "gemma3": r"with another norm \(rms, weight \+ 1\)",
    "paligemma": r"with another norm \(rms, weight \+ 1\)",
    "paligemma2": r"with another norm \(rms, weight \+ 1\)",
    "qwen3_5": "with linear attention",
    "qwen3_5_moe": "with linear attention",
}
FUSED = [name for name in FAMILIES if name not in BLOCKED]


@pytest.fixture(params=FUSED)
def name(request):
    return request.param


@pytest.mark.pairs
@pytest.mark.parametrize("kind", ["one", "several", "batch"])
@pytest.mark.parametrize("case", ["unpruned", *CASES])
def test_answers_and_records_are_those_of_the_stock_loop(name, kind, case):
    family = FAMILIES[name]
    model, prompts = family.model(), family.of(kind)
    results = []
    for engine in ("eager", "graph"):
        wanted = VTRConfig(enabled=False, engine=engine) if case == "unpruned" else config(family, case, engine=engine)
        with strategy.prune(model, wanted) as run:
            tokens = model.generate(**prompts.call, max_new_tokens=16, do_sample=False)
        results.append((tokens, [kept for stage in run.stages for kept in stage.kept], run))
    (stock, kept, told), (tokens, own, run) = results
    assert torch.equal(tokens, stock)
    assert len(own) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(own, kept, strict=True))
    assert (run.samples, run.decoded) == (told.samples, told.decoded)
    assert "stock loop" not in run.graph_report()
    assert "vision: stock modules (the backbone " in run.graph_report()
    assert "stock prefill" not in run.graph_report()


@pytest.mark.parametrize("name", BLOCKED)
def test_layers_that_cannot_be_fused_are_refused_with_the_reason_and_answered_by_the_stock_loop(name):
    family = FAMILIES[name]
    model, prompts = family.model(), family.of("one")
    with pytest.raises(ValueError, match=f"engine=graph: .*{BLOCKED[name]}"):
        strategy.attach(model, config(family, engine="graph"))
    answers = []
    for engine in ("eager", "auto"):
        with strategy.prune(model, config(family, engine=engine)) as run:
            answers.append(model.generate(**prompts.call, max_new_tokens=4, do_sample=False))
    assert torch.equal(*answers)
    assert run.samples == 1
