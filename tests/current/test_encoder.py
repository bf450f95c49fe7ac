"""What strategies see of a vision tower, where `generate` encodes pictures in front of the model itself."""

import math
from typing import Any

import pytest
import torch
from current_models import FAMILIES, Family
from encoder_checks import *  # noqa: F403
from encoder_checks import whole_attention
from matrix import ENCODED, runs_on
from qwen_checks import Prompts
from qwen_encoder_checks import check, stock
from torch import Tensor

import strategy
from strategy import VTRConfig

QWENS = [name for name in FAMILIES if name.startswith("qwen") and not name.endswith("moe")]
TILED = ["gemma3", "internvl3", "paligemma2"]
UNDESCRIBED = ["llava_next", "llava_onevision"]


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["one", "several", "batch"])
def test_each_sample_is_given_its_own_squares(looks, kind, beams):
    family = FAMILIES["llava_hf"]
    model, prompts = family.model("eager"), family.of(kind)
    tower = model.model.vision_tower
    stock = tower(prompts.call["pixel_values"], output_attentions=True, output_hidden_states=True)
    attention, features = stock.attentions[-2][:, :, 0, 1:], stock.hidden_states[-2][:, 1:]
    with strategy.prune(model, VTRConfig(strategy="looks", keep_tokens=20)):
        for _ in range(2):
            looks.clear()
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False, num_beams=beams)
            found = {sample: (view, row) for view in looks for row, sample in enumerate(view.samples)}
            pictures = [len(grids) for grids in prompts.grids for _ in range(beams)]
            assert sorted(found) == [sample for sample, count in enumerate(pictures) if count]
            for sample, (view, row) in found.items():
                before = sum(map(len, prompts.grids[: sample // beams]))
                own = slice(before, before + pictures[sample])
                expected = torch.cat([*attention[own]], dim=-1), features[own].flatten(0, 1)
                torch.testing.assert_close(view.encoder.attention[row], expected[0], rtol=0, atol=1e-5)
                torch.testing.assert_close(view.encoder.features[row], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "beams"), [("several", 2), ("batch", 1)])
@pytest.mark.parametrize("name", QWENS)
def test_each_sample_is_given_its_own_pictures_and_videos(looks, name, kind, beams):
    family = FAMILIES[name]
    model, prompts = family.model("sdpa"), family.of(kind)
    expected = [own for own in stock(family.model("eager"), prompts) for _ in range(beams)]
    with strategy.prune(model, VTRConfig(strategy="looks", retain_ratio=0.5, prune_layer=family.stages[0])):
        for _ in range(2):
            looks.clear()
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False, num_beams=beams)
            check(looks, expected)


@torch.no_grad()
def tiles(family: Family, prompts: Prompts) -> list[list[Tensor]]:
    """For each sample what the tower's own attention matrices, and its own way to make tokens of patches, give."""
    model, seen = family.model("eager"), []
    tower, classes = model.model.vision_tower, int(family is FAMILIES["internvl3"])
    layer = (tower.encoder.layer if classes else tower.encoder.layers)[-2]
    attending = layer.attention if classes else layer.self_attn

    def tokens(values: Tensor) -> Tensor:
        side = math.isqrt(values.shape[1])
        square = values.unflatten(1, (side, side))
        if classes:
            return model.model.pixel_shuffle(square.contiguous()).flatten(1, 2).unflatten(2, (4, -1)).mean(2)
        if not hasattr(model.model.multi_modal_projector, "avg_pool"):
            return values
        return model.model.multi_modal_projector.avg_pool(square.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)

    handles = [
        attending.k_proj.register_forward_hook(lambda module, args, out: seen.append(out)),
        layer.register_forward_hook(lambda module, args, out: seen.append(out)),
    ]
    try:
        with whole_attention(attending) as weights:
            tower(prompts.call["pixel_values"])
    finally:
        for handle in handles:
            handle.remove()
    [matrix], (keys, features) = weights, seen
    paid = matrix[:, :, 0, 1:] if classes else matrix.sum(2)
    found = [tokens(each) for each in (paid.transpose(1, 2), keys[:, classes:], features[:, classes:])]
    found[1] = found[1].unflatten(2, (matrix.shape[1], -1))
    counts = [len(grids) for grids in prompts.grids]
    parts = zip(*(each.split(counts) for each in found), strict=True)
    return [[each.flatten(0, 1) for each in own] if len(own[0]) else [] for own in parts]


@pytest.mark.parametrize("kind", ["one", "several", "batch"])
@pytest.mark.parametrize("name", TILED)
def test_each_sample_is_given_its_own_tiles(looks, name, kind):
    family = FAMILIES[name]
    model, prompts = family.model("sdpa"), family.of(kind)
    with strategy.prune(model, VTRConfig(strategy="looks", retain_ratio=0.5, prune_layer=1)):
        model.generate(**prompts.call, max_new_tokens=2, do_sample=False)
    found: dict[int, Any] = {sample: (view, row) for view in looks for row, sample in enumerate(view.samples)}
    expected = tiles(family, prompts)
    assert sorted(found) == [sample for sample, own in enumerate(expected) if own]
    for sample, (view, row) in found.items():
        paid, keys, features = expected[sample]
        torch.testing.assert_close(view.encoder.attention[row], paid.T, rtol=0, atol=1e-5)
        torch.testing.assert_close(view.encoder.keys[row], keys.transpose(0, 1), rtol=0, atol=1e-5)
        torch.testing.assert_close(view.encoder.features[row], features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODED)
def test_strategies_that_look_at_the_tower_prune_what_is_described_and_are_refused_elsewhere(family, name):
    model, prompts = family.model("eager"), family.of("batch")
    if family not in [FAMILIES[each] for each in UNDESCRIBED]:
        budget = {"keep_tokens": 12} if "keep_tokens" in family.budget else {"retain_ratio": 0.5}
        with strategy.prune(model, VTRConfig(strategy=name, **budget)) as run:
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False)
        [stage] = run.stages
        wanted = [min(count, 12) if "keep_tokens" in budget else count // 2 for count in map(len, prompts.visual)]
        assert [len(kept) for kept in stage.kept] == wanted
        return
    assert not runs_on(model, name)
    with pytest.raises(
        ValueError, match=rf"^{name} looks at what the vision tower saw, but the backbone \w+ describes"
    ):
        strategy.attach(model, VTRConfig(strategy=name))
