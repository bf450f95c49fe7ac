"""What makes a stock model one that prunes: a decoder loop and a model state that knows what is gone."""

from functools import partial
from typing import Any

from torch import Tensor

from vllm_vtr import versions
from vllm_vtr.model_state import PruningModelState


class Pruned:
    """A stock model that runs prompts which are to be pruned through `PruningPrefill`, and all others as they are."""

    state: PruningModelState | None = None
    language_model: Any

    def get_model_state_cls(self) -> type[PruningModelState]:
        """Return the class that Model Runner V2 keeps the state of requests in."""
        return PruningModelState

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        prefill = self.state.prefill if self.state else None
        if self.state is None or prefill is None or inputs_embeds is None:
            stock: Any = super()
            reserved = self.state.reserve(positions.shape[-1]) if self.state else None
            output = stock.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            del reserved
            return output
        count = len(inputs_embeds)
        with versions.uncompiled(self.state.methods):
            output = prefill.run(self.language_model.model, positions, inputs_embeds, self.added_features(count))
        self.clear_added_features(count)
        return output

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the embeddings of pictures or videos; a strategy may want to know what the tower sees of them."""
        embed = partial(super().embed_multimodal, **kwargs)  # type: ignore[misc]
        return embed() if self.state is None or self.state.tower is None else self.state.tower.record(embed)

    def added_features(self, length: int) -> list[Tensor]:
        """Return what the stock loop adds behind the first layers, [length, C] for each of these."""
        return []

    def clear_added_features(self, length: int) -> None:
        """Clear the buffers of these features for the next step, as the stock forward call does."""
