"""What the host computes while a GPU sees the pictures of a Qwen; the tests of each import all from here."""

import warnings

import pytest
import torch
from fast_checks import answer, config

import strategy
from strategy.graph import generator
from strategy.graph.vision import VisionGraphs


@torch.no_grad()
def test_places_and_positions_are_found_on_the_host_as_by_the_stock_methods(asked, device):
    model = asked.model.model
    given = {name: asked.prompts["mixed"][name] for name in ("input_ids", "attention_mask", "image_grid_thw")}
    ids = given["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    features = embeddings.new_zeros(int((ids == model.config.image_token_id).sum()), embeddings.shape[-1])

    def found():
        places = [model.get_placeholder_mask(*call, image_features=features) for call in calls]
        return [*model.get_rope_index(**given), *places[0], *places[1]]

    calls = ((ids, embeddings), (None, embeddings))
    stock = found()
    with strategy.prune(asked.model, strategy.VTRConfig(engine="graph", enabled=False)):
        assert "get_rope_index" in vars(model)
        seen = found()
        with pytest.raises(ValueError, match="do not match"):
            model.get_placeholder_mask(ids, embeddings, image_features=features[1:])
    assert "get_rope_index" not in vars(model)
    for ours, theirs in zip(seen, stock, strict=True):
        assert ours.device == theirs.device
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["one", "several", "mixed"])
def test_the_host_does_not_wait_for_the_tower_before_it_launches_the_prefill(asked, device, kind, monkeypatch):
    if device == "cpu":
        pytest.skip("the host waits for GPUs only")
    see, prefill = VisionGraphs.forward, generator.prefill_batch

    def seen(*args, **kwargs):
        output = see(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        return output

    def prefilled(*args):
        hidden = prefill(*args)
        torch.cuda.set_sync_debug_mode("default")
        return hidden

    with strategy.prune(asked.model, config(asked)):
        for _ in range(3):
            answer(asked, kind)
        for mode in ("warn", "default"):  # the first time, torch warns that it may miss some
            torch.cuda.set_sync_debug_mode(mode)
        monkeypatch.setattr(VisionGraphs, "forward", seen)
        monkeypatch.setattr(generator, "prefill_batch", prefilled)
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                answer(asked, kind)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [str(wait.message) for wait in waits] == []


@torch.no_grad()
def test_prompts_without_token_ids_are_answered_as_by_the_stock_loop(asked):
    prompt = asked.prompts["text"]
    given = {
        "inputs_embeds": asked.model.get_input_embeddings()(prompt["input_ids"]),
        "attention_mask": prompt["attention_mask"],
    }
    answers = []
    for engine in ("eager", "graph"):
        with strategy.prune(asked.model, strategy.VTRConfig(engine=engine, enabled=False)):
            answers.append(asked.model.generate(**given, do_sample=False, max_new_tokens=4))
    assert torch.equal(*answers)
