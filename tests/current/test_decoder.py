"""Bare text decoders, with their layout given by hand."""

import pytest
import torch
from current_models import FAMILIES
from test_model import config

import strategy
from strategy.backbone import find_backbone

BARE = [name for name, family in FAMILIES.items() if find_backbone(family.model()).decoders]


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("name", BARE)
@torch.no_grad()
def test_a_bare_decoder_prunes_as_it_does_inside_its_model(name, kind):
    family, given, outputs = FAMILIES[name], {}, []
    model, prompts = family.model(), family.of(kind)
    decoder, backbone = family.decoder(model), find_backbone(family.model())
    layout = backbone.layout(model, prompts.call)
    shown = decoder.register_forward_hook(lambda module, args, output: outputs.append(output.last_hidden_state))
    with strategy.prune(model, config(family)) as inside:
        # The hook has to see the call as the model makes it, before the prune takes anything out of it.
        keep = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: given.update(kwargs), with_kwargs=True, prepend=True
        )
        model(**prompts.call, use_cache=False)
    keep.remove()
    assert not given.get("return_dict") or given.pop("return_dict")
    with strategy.prune(decoder, config(family), backbone=backbone.name, layout=layout) as alone:
        decoder(**given)
    shown.remove()
    assert torch.equal(*outputs)
    for one, other in zip(inside.stages, alone.stages, strict=True):
        assert one.after < one.before
        assert all(torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
