"""What strategies see of a vision tower, where `generate` encodes pictures in front of the model itself."""

import pytest
import torch
from current_models import FAMILIES
from encoder_checks import *  # noqa: F403
from matrix import ENCODED, runs_on

import strategy
from strategy import VTRConfig


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["one", "several", "batch"])
def test_each_sample_is_given_its_own_pictures(looks, kind, beams):
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


@pytest.mark.parametrize("name", ENCODED)
def test_strategies_that_look_at_the_tower_prune_what_is_described_and_are_refused_elsewhere(family, name):
    model, prompts = family.model("eager"), family.of("batch")
    if runs_on(model, name):
        assert family is FAMILIES["llava_hf"]
        with strategy.prune(model, VTRConfig(strategy=name, keep_tokens=20)) as run:
            model.generate(**prompts.call, max_new_tokens=2, do_sample=False)
        assert [len(kept) for kept in run.stages[0].kept] == [20, 20, 0]
        return
    with pytest.raises(
        ValueError, match=rf"^{name} looks at what the vision tower saw, but the backbone \w+ describes"
    ):
        strategy.attach(model, VTRConfig(strategy=name))
