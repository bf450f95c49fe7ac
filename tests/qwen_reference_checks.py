"""Command lines of PriorTR, as both Qwen wrappers take them.

The tests of a backbone import everything from here and give a fixture `wrapper`, a `lmms_checks.Wrapper`.
"""

import pytest


@pytest.mark.parametrize(
    ("arguments", "layers", "kept"),
    [
        ("vtr_strategy=priortr,vtr_keep_ratio=0.2222,vtr_prune_layer=3", (3,), (67,)),
        ("strategy=priortr,keep_ratio=0.25,query_aggregation=auto,device_map=cpu", (3,), (76,)),
        ("vtr_strategy=fastv,vtr_keep_ratio=0.5,vtr_query_aggregation=auto,vtr_head_aggregation=mean", (2,), (152,)),
        ("vtr_strategy=clse,vtr_keep_ratio=0.334,vtr_query_aggregation=auto", (1, 4, 8), (173, 109, 29)),
    ],
)
def test_a_ratio_and_an_aggregation_of_priortr_are_taken(wrapper, arguments, layers, kept):
    plan = wrapper.load(arguments).record.plan
    assert (plan.layers, plan.kept(304)) == (layers, kept)
