"""Hooks and attributes put on a stock model, and taken off as one thing."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class ModelPatch:
    """The hooks and replaced attributes of one attached model."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on a module until `remove`."""
        self.replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    def remove(self) -> None:
        """Remove every hook, and restore the attributes."""
        for handle in self.handles:
            handle.remove()
        for module, name, before in reversed(self.replaced):
            delattr(module, name) if before is None else setattr(module, name, before)
        self.handles, self.replaced = [], []
