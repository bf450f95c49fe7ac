"""V2Drop by hand."""

import torch
from views import view_of

from strategy import Facts, VTRConfig, registry


def make(**knobs):
    return registry.get("v2drop")(VTRConfig(strategy="v2drop", **knobs))


def test_the_score_is_the_distance_that_a_layer_moved_a_token():
    before = torch.tensor([[[0.0, 0], [1, 1], [5, 5], [2, 0]]])
    moved = torch.tensor([[[3.0, 4], [0, 0], [0, -1], [0.6, 0.8]]])  # by 5, 0, 1 and 1
    view = view_of(before + moved, torch.zeros(1, 1, 1, 4), keep=2, entered=before)
    torch.testing.assert_close(make().score(view), torch.tensor([[5.0, 0, 1, 1]]))
    assert make().select(view).tolist() == [[0, 2]]  # of the last two the first


def test_half_and_a_quarter_of_the_tokens_and_one_at_the_end():
    facts = Facts(depth=32, nominal_tokens=576)
    assert make().plan(facts).layers == (3, 17, 22)
    assert make().plan(facts).kept(576) == (288, 144, 1)
    assert make(keep_tokens=64).plan(facts).kept(576) == (96, 48, 1)
    assert make().plan(Facts(depth=28, nominal_tokens=576)).layers == (3, 15, 19)
    assert make(retain_ratio=0.5).plan(Facts(depth=28, nominal_tokens=576, own_size=True)).kept(100) == (75, 37, 1)
