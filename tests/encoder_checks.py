"""A strategy that looks at the vision tower, for tests of what it is shown, and what the stock tower computes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import strategy
from strategy.base import Strategy


@contextmanager
def whole_attention(module: nn.Module) -> Iterator[list[Tensor]]:
    """The attention matrices [P, heads, L, L] of each piece that an eager attention module of the library sees."""
    home, weights = sys.modules[type(module).__module__], []
    stock = home.eager_attention_forward

    def recording(own: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = stock(own, *args, **kwargs)
        if own is module:
            weights.append(output[1])
        return output

    with patch.object(home, "eager_attention_forward", recording):
        yield weights


@pytest.fixture
def looks(monkeypatch):
    """The views of a strategy of that name, which keeps the first tokens."""
    views = []

    class Looks(Strategy):
        encoder_layer = -2

        def plan(self, facts):
            return strategy.registry.get("uniform").plan(self, facts)

        def score(self, view):
            views.append(view)
            return torch.zeros(view.visual.shape)

    monkeypatch.setitem(strategy.registry._strategies, "looks", Looks)
    return views
