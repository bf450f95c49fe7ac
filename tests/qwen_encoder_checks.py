"""What strategies see of a Qwen's vision tower is what the stock tower computes, with its whole attention matrices.

The tests that import this give a fixture `tiny`, see `qwen_checks`.
"""

import math
from typing import Any

import pytest
import torch
from encoder_checks import *  # noqa: F403
from encoder_checks import whole_attention
from engine_checks import flop_counter
from matrix import ENCODED
from qwen_checks import PROMPTS, Prompts, make
from torch import Tensor

import strategy
from strategy import VTRConfig

KEPT = {"retain_ratio": 0.5, "prune_layer": 1}


@torch.no_grad()
def stock(model: Any, prompts: Prompts) -> list[list[Tensor]]:
    """For each sample: what its patches pay each token [N, heads], keys [N, heads, width] and features [N, C]."""
    tower, heads = model.model.visual, model.config.vision_config.num_heads
    layer, found = tower.blocks[-2], {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels not in prompts.call:
            continue
        grids, seen = prompts.call[f"{kind}_grid_thw"], {}
        handles = [
            layer.attn.qkv.register_forward_hook(lambda module, args, out, seen=seen: seen.update(qkv=out)),
            layer.register_forward_hook(lambda module, args, out, seen=seen: seen.update(features=out)),
            # What the tower does with the order of its tokens shows where they are numbered.
            tower.merger.register_forward_hook(
                lambda module, args, out: torch.arange(len(out))[:, None].expand_as(out).to(out)
            ),
        ]
        try:
            with whole_attention(layer.attn) as weights:
                output = tower(prompts.call[pixels], grid_thw=grids)
        finally:
            for handle in handles:
                handle.remove()
        order = getattr(output, "pooler_output", output)[:, 0].long()
        paid = torch.cat([piece[0].sum(1) for piece in weights], dim=1).T
        keys = seen["qkv"].chunk(3, dim=-1)[1].unflatten(-1, (heads, -1))
        tokens = [each.unflatten(0, (-1, 4)).mean(1)[order] for each in (paid, keys, seen["features"])]
        sizes = (grids.prod(1) // 4).tolist()
        found[kind] = iter(list(zip(*(each.split(sizes) for each in tokens), strict=True)))
    samples = []
    for grids in prompts.grids:
        own = [next(found["video" if frames > 1 else "image"]) for frames, *_ in grids]
        assert [len(each[0]) for each in own] == [math.prod(grid) for grid in grids]
        samples.append([torch.cat(parts) for parts in zip(*own, strict=True)])
    return samples


def check(views: list[Any], expected: list[list[Tensor]]) -> None:
    """Each sample with pictures saw what is expected."""
    found = {sample: (view, row) for view in views for row, sample in enumerate(view.samples)}
    assert sorted(found) == [sample for sample, own in enumerate(expected) if own]
    for sample, (view, row) in found.items():
        paid, keys, features = expected[sample]
        for own, other in (
            (view.encoder.attention[row], paid.T),
            (view.encoder.keys[row], keys.transpose(0, 1)),
            (view.encoder.features[row], features),
        ):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
        # Patches that see each other pay each other 1 on average, whatever the size of picture and window.
        torch.testing.assert_close(paid.mean(0), torch.ones(paid.shape[1]))


def test_each_sample_is_given_its_own_pictures(tiny, prompts, looks):
    model, expected = tiny.model("sdpa"), stock(tiny.model("eager"), prompts)
    with strategy.prune(model, VTRConfig(strategy="looks", **KEPT)):
        for _ in range(2):
            looks.clear()
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False)
            check(looks, expected)


def test_beams_see_the_pictures_of_their_prompt(tiny, looks):
    prompts = make(PROMPTS["a video between two images"], tiny.stamp)
    model, [expected] = tiny.model("sdpa"), stock(tiny.model("eager"), prompts)
    with strategy.prune(model, VTRConfig(strategy="looks", **KEPT)):
        model.generate(**prompts.call, max_new_tokens=2, do_sample=False, num_beams=2)
    check(looks, [expected, expected])


@pytest.mark.parametrize("pieces", [1, 7, 10**6])
def test_the_attention_is_the_same_in_pieces_of_any_size(tiny, looks, monkeypatch, pieces):
    monkeypatch.setattr("strategy.kernels.attention.MAX_ATTENTION", pieces)
    prompts = make(PROMPTS["a video between two images"], tiny.stamp)
    model, expected = tiny.model("sdpa"), stock(tiny.model("eager"), prompts)
    with strategy.prune(model, VTRConfig(strategy="looks", **KEPT)):
        model(**prompts.call)
    check(looks, expected)


def alone(prompts: Prompts, sample: int) -> dict[str, Any]:
    """The arguments of one sample of a batch."""
    real = prompts.call["attention_mask"][sample].bool()
    call = {name: prompts.call[name][sample : sample + 1, real] for name in ("input_ids", "attention_mask")}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        counts = [sum((frames > 1) == (kind == "video") for frames, *_ in grids) for grids in prompts.grids]
        if counts[sample]:
            grids = prompts.call[f"{kind}_grid_thw"].split(counts)
            patches = [int(own.prod(1).sum()) for own in grids]
            call[f"{kind}_grid_thw"] = grids[sample]
            call[pixels] = prompts.call[pixels].split(patches)[sample]
    return call


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODED)
def test_a_batch_keeps_what_its_samples_keep_alone(tiny, name):
    model, kept = tiny.model("sdpa"), []
    parts = [*PROMPTS["one sample without an image"], *PROMPTS["a video between two images"]]
    prompts = make(parts, tiny.stamp)
    pictured = [sample for sample, grids in enumerate(prompts.grids) if grids]
    for call in (prompts.call, *(alone(prompts, sample) for sample in pictured)):
        with strategy.prune(model, VTRConfig(strategy=name, **KEPT)) as run:
            model(**call)
        kept += [each.tolist() for each in run.stages[0].kept if len(each)]
    assert [len(each) for each in kept] == [12, 12, 27] * 2
    assert kept[:3] == kept[3:]


@torch.no_grad()
def test_what_looking_costs_is_counted_as_torch_counts_it(tiny):
    model, prompts = tiny.model("sdpa"), make(PROMPTS["a video between two images"], tiny.stamp)
    vision = {}
    for name in ("uniform", "scope"):
        with strategy.prune(model, VTRConfig(strategy=name, **KEPT)) as run, flop_counter() as counter:
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False)
        assert sum(run.multiply_adds.values()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
        vision[name] = run.multiply_adds["vision"]
    # Each patch of a frame pays all of its patches, in numbers as wide as all heads.
    pairs = sum(frames * (16 * height * width * height * width) for frames, height, width in prompts.grids[0])
    assert vision["scope"] - vision["uniform"] == pairs * 32


def test_a_tower_that_is_none_of_clip_has_no_text(tiny):
    config = VTRConfig(strategy="cdpruner", clip_text="openai/clip-vit-large-patch14-336")
    model = tiny.model("sdpa")
    with pytest.raises(ValueError, match=r"^cdpruner: clip_text='openai/.*', but the backbone \w+ knows no CLIP model"):
        strategy.attach(model, config)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
