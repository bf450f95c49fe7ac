"""The packed weights of a decoder, and whether they are still those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from strategy.kernels import llama_layer
from strategy.kernels.layer_spec import LayerSpec
from strategy.kernels.llama_layer import LayerShape, LayerWeights

_version = attrgetter("_version")


class PackedWeights:
    """Packs a decoder's projections, again after each change of the model's tensors.

    Args:
        model: The model, all of whose tensors captured graphs may read.
        decoder: Its decoder.
        specs: Descriptions of the decoder's layers.
    """

    def __init__(self, model: Any, decoder: Any, specs: Sequence[LayerSpec]) -> None:
        self.model, self.decoder, self.specs = model, decoder, specs
        self.layers: list[LayerWeights] = []
        self.shapes: list[LayerShape] = []
        self.signature: Sequence[Any] = ()
        self.modules: list[tuple[dict[str, Any], str, Any]] = []
        self.holders: list[dict[str, Any]] = []

    @property
    def current(self) -> bool:
        """Return whether the weights are packed, and the model's tensors are the same ones, unchanged."""
        return bool(self.signature) and self.signature == self._signature()

    def pack(self) -> None:
        """Pack the projections of each layer."""
        self.layers = llama_layer.pack_projections(self.decoder.layers, self.specs)
        self.shapes = [
            llama_layer.layer_shape(layer, spec) for layer, spec in zip(self.decoder.layers, self.specs, strict=True)
        ]
        self.signature = self._signature()

    def unpack(self) -> None:
        """Give each weight memory of its own again."""
        if self.layers:
            llama_layer.unpack_projections(self.decoder.layers, self.specs, self.layers)
        self.signature = ()

    def _signature(self) -> Sequence[Any]:
        """Return what differs after any tensor of the model was changed or exchanged."""
        if not self.holders or any(holder.get(name) is not module for holder, name, module in self.modules):
            every = list(self.model.modules())
            self.modules = [(m._modules, name, child) for m in every for name, child in m._modules.items()]
            self.holders = [holder for m in every for holder in (m._parameters, m._buffers) if holder]
        tensors = [tensor for holder in self.holders for tensor in holder.values() if tensor is not None]
        try:
            versions = [*map(_version, tensors)]
        except RuntimeError:  # tensors made in inference mode have no version
            versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        return [*map(Tensor.data_ptr, tensors)], versions
