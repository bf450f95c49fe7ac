"""Which caches a prune can trim, told by what they hold and not by the names of their classes."""

from types import SimpleNamespace

import pytest
import torch

from strategy.kernels.kv_cache import can_trim


def cache(**parts):
    return SimpleNamespace(get_seq_length=lambda: 0, **parts)


class Growing:
    is_compileable = False


class Fixed:
    is_compileable = True


GROWING, FIXED = Growing(), Fixed()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, True),
        (((torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)),), True),
        (cache(layers=[]), True),
        (cache(layers=[], layer_class_to_replicate=Growing), True),
        (cache(layers=[GROWING, GROWING], offloading=False), True),
        (cache(layers=[GROWING, FIXED]), False),
        (cache(layers=[], layer_class_to_replicate=Fixed), False),
        (cache(layers=[GROWING], offloading=True), False),
        (cache(layers=[SimpleNamespace(is_compileable=False, residual_length=128)]), False),
        (cache(key_cache=[], value_cache=[]), True),
        (cache(key_cache=[], value_cache=[], window_length=8), False),
        (cache(self_attention_cache=None, cross_attention_cache=None), False),
    ],
)
def test_a_cache_that_holds_what_was_written_can_be_trimmed(given, expected):
    assert can_trim(given) is expected
