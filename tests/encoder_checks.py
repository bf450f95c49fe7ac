"""A strategy that looks at the vision tower, for tests of what it is shown."""

import pytest
import torch

import strategy
from strategy.base import Strategy


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
