"""The programs of a fused decoder: prefill with pruning, and one decode step.

A prefill is one program over all layers, which prunes by the same stage runner as the hooks on stock layers. The tokens
behind it come from a second program, which reads and writes a cache of fixed size, so that one graph serves every step.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from strategy.backbone import Backbone
from strategy.distributed.collectives import broadcast_first
from strategy.graph.bucketing import graph_inputs, with_graph_inputs
from strategy.graph.cuda_graphs import CudaGraphCache, ProgramKey
from strategy.graph.fallback import FallbackPolicy
from strategy.graph.side_stream import SideStream
from strategy.graph.static_cache import StaticCachePool, StaticKVCache
from strategy.graph.weights import PackedWeights
from strategy.kernels import kv_cache, llama_layer
from strategy.kernels.attention import gather_rows
from strategy.kernels.decode_attention import kernel_takes
from strategy.kernels.layer_facts import tp_group_of
from strategy.kernels.layer_spec import LayerSpec, norm_epsilon
from strategy.metrics.record import Stage
from strategy.pruning.stage import LayerStates, StageRunner
from strategy.pruning.state import PrefillState

DECODE_CHUNK = 256  # tokens that are decoded before a longer cache is needed
LAYERS_PER_CACHE_WRITE = 4  # layers whose keys and values are written at once, beside the layers that follow
BYTES_PER_CACHE_WRITE = 2**28  # of keys and values that wait to be written; so it is fewer layers of a large batch


@dataclass
class GenerationState:
    """A greedy answer that the graph engine makes.

    Attributes:
        max_new_tokens: How many tokens the answer may have.
        graph_prefill: Whether programs prefill the prompts.
        lengths: Of the prompts.
        cache: The cache to decode on.
        cache_length: How many of its slots the longest prompt takes.
        finish: Waits for the prefill by programs, checks it, and writes it into the record.
    """

    max_new_tokens: int
    graph_prefill: bool = False
    lengths: Sequence[int] = ()
    cache: StaticKVCache | None = None
    cache_length: int = 0
    finish: Callable[[], None] | None = None


class FusedDecoder:
    """The fused layers of one attached model, their caches and their graphs.

    Args:
        model: The model.
        decoder: Its decoder.
        backbone: Its family.
        specs: Descriptions of the decoder's layers.
        runner: Prunes between layers, and writes the record.
        policy: Says what is compiled.
    """

    def __init__(
        self,
        model: Any,
        decoder: Any,
        backbone: Backbone,
        specs: Sequence[LayerSpec],
        runner: StageRunner,
        policy: FallbackPolicy,
    ) -> None:
        self.model, self.decoder, self.backbone, self.runner, self.policy = model, decoder, backbone, runner, policy
        # A graph has one set of inputs, so one thread at a time.
        self.lock = threading.RLock()
        self.weights = PackedWeights(model, decoder, specs)
        self.caches = StaticCachePool()
        self.graphs = CudaGraphCache(torch.device("cpu"))
        self.side_stream = SideStream(torch.device("cpu"))
        self.scoring_costs: dict[ProgramKey, int] = {}

    def __deepcopy__(self, memo: Any) -> FusedDecoder:
        # Graphs read the weights of the model that they were captured with, so a copy begins without any.
        parts = (self.model, self.decoder, self.backbone, self.weights.specs, self.runner, self.policy)
        other = memo[id(self)] = FusedDecoder.__new__(FusedDecoder)
        other.__init__(*(copy.deepcopy(part, memo) for part in parts))  # type: ignore[misc]
        return other

    def prepare(self) -> None:
        """Pack the weights; after a change of the model's tensors pack again, without the graphs that read them."""
        if self.weights.current:
            return
        self.free()
        with plain_tensors():
            self.weights.pack()
        layers = self.decoder.layers
        device, report = next(layers.parameters()).device, self.runner.record.decide
        self.graphs = CudaGraphCache(device, group=tp_group_of(layers), report=report)
        self.side_stream = SideStream(device)

    def free(self) -> None:
        """Free graphs and caches, and give each weight memory of its own again."""
        self.graphs.clear()
        self.scoring_costs = {}
        self.weights.unpack()

    def cache(self, batch: int, length: int) -> StaticKVCache:
        """Return a cache for so many samples with at least so many slots."""
        return self.caches.get(self.weights.shapes, self.weights.layers, batch, length)

    def prefill(self, x: Tensor, positions: Tensor, state: PrefillState, cache: StaticKVCache) -> Tensor:
        """Run all layers over prompts, and fill a cache.

        Args:
            x: Embeddings [B, L, C] of bucketed prompts.
            positions: Their positions.
            state: The state of the prompts, of one group; receives the stages.
            cache: The cache, one of this decoder.

        Returns:
            The normalised hidden state [B, 1, C] of each prompt's last token.
        """
        (group,), (batch, length), plan = state.groups, x.shape[:2], self.runner.plan
        left = [group.num_visual, *(plan.kept(group.num_visual) if plan else ())]
        inputs = [x, positions, *graph_inputs(state)]
        details = (cache.length, group.kinds, *((tensor.shape, tensor.dtype) for tensor in inputs))
        key = ProgramKey("prefill", details, f"of {batch} x {length} tokens into {cache.length} slots")
        costs = self.runner.record.multiply_adds
        before = costs["scoring"]
        program = partial(self._prefill_program, state, cache)
        with self.policy.compiling("prefilling", self.graphs.device):
            hidden, (state.finite, state.selected), kept = self.graphs.run(key, program, inputs, warmup=True)
        # A replayed graph counts nothing.
        costs["scoring"] = before + self.scoring_costs.setdefault(key, costs["scoring"] - before)
        if plan:
            for layer, had, has, own in zip(plan.layers, left[:-1], left[1:], kept, strict=True):
                state.stages.append(Stage(layer, batch * had, batch * has, tuple(own)))
                if has < had:
                    state.lengths.append(length - group.num_visual + has)
        return hidden

    def import_cache(self, cache: Any, state: PrefillState, generation: GenerationState) -> None:
        """Copy what a prefill by the stock layers left in their cache.

        Args:
            cache: The stock cache.
            state: The state of the prompts.
            generation: Receives the cache to decode on.
        """
        pruned = state.pruned_prompt()
        real = state.real if pruned is None else pruned.real
        held = real.sum(1)
        generation.cache_length = int(held.max())
        room = generation.cache_length + min(generation.max_new_tokens, DECODE_CHUNK)
        static = generation.cache = self.cache(len(real), room)
        static.clear()
        # Real tokens first, in order.
        order = (~real).sort(dim=1, stable=True).indices[:, None, : generation.cache_length, None]
        for number in range(len(self.weights.layers)):
            static.fill(number, *(tensor.take_along_dim(order, 2) for tensor in kv_cache.read(cache, number)))
        static.slot.copy_(held)
        static.position.copy_(state.position[:, 0])

    def decode_step(self, cache: StaticKVCache) -> Callable[[], None]:
        """Return a function that decodes one token of each sample on a cache."""
        batch, size, program = len(cache.token), cache.nbytes, partial(self._decode_program, cache)
        key = ProgramKey("decode", (batch, cache.length), f"of {batch} samples on {cache.length} slots")

        def step() -> None:
            with self.policy.compiling("decoding", self.graphs.device):
                self.graphs.run(key, program, size=size)

        return step

    # The programs.

    def _prefill_program(
        self, start: PrefillState, cache: StaticKVCache, x: Tensor, positions: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Run all layers over prompts [B, L, C] that begin like `start`, with what differs between such prompts.

        Returns:
            The last token's hidden state [B, 1, C], `PrefillState.finite` and `selected`, and the visual tokens [B, K]
            left after each stage. The cache is filled.
        """
        cache.clear()
        try:
            return self._run_layers(with_graph_inputs(start, inputs), cache, x, positions)
        finally:
            # A capture that fails must not end with two streams, and memory returns to the first one.
            self.side_stream.wait()

    def _run_layers(
        self, state: PrefillState, cache: StaticKVCache, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Any, list[Tensor]]:
        plan, weights, shapes = self.runner.plan, self.weights.layers, self.weights.shapes
        stages = {layer: stage for stage, layer in enumerate(plan.layers)} if plan else {}
        whole = self.backbone.rotary_at(self.decoder, positions)
        cos, sin = whole
        kept: list[Tensor] = []
        computed: list[tuple[int, Tensor, Tensor]] = []
        written: list[tuple[int, Tensor, Tensor]] = []
        if 0 in stages:
            x = self.runner.prune(state, 0, x)
        for number, (own, shape) in enumerate(zip(weights, shapes, strict=True)):
            if number in stages:
                kept.append(state.groups[0].original_index)
                if state.index is not None:
                    cos, sin = (gather_rows(table, state.index) for table in whole)
            if plan and number == plan.reference:
                state.reference = x
            stage = stages.get(number + 1)
            entered = x
            x, queries, keys, values = llama_layer.prefill(x, cos, sin, own, shape)
            computed.append((number, keys, values))
            if stage is not None:
                x = self.runner.prune(state, stage, x, layer_states(entered, queries, keys, shape))
            if number < len(state.added):
                x = x + state.remaining_rows(state.added[number]).to(x)
            all_kept_known = plan is None or number + 1 >= plan.layers[-1]
            if all_kept_known and (_enough_to_write(computed) or number + 1 == len(weights)):
                self.side_stream.wait()
                # The side stream still reads the tensors of `written`, which are kept until it has been waited for.
                written, computed = computed, []
                with self.side_stream.scope():
                    _write_cache(cache, state, written)
        last_positions = state.last_positions(x.shape[1])
        last = gather_rows(x, last_positions)
        cache.slot.copy_(last_positions[:, 0] + 1)
        cache.position.copy_(state.position[:, 0])
        finite = state.finite & last.isfinite().all() if plan else state.finite
        return self.final_norm(last), (finite, state.selected), kept

    def _decode_program(self, cache: StaticKVCache) -> None:
        x = self.model.get_input_embeddings().forward(cache.token[:, None])
        cos, sin = self.backbone.rotary_at(self.decoder, cache.position[:, None])
        seen, shapes = None, self.weights.shapes
        if not all(
            kernel_takes(keys, s.heads // s.key_heads) for (keys, _), s in zip(cache.layers, shapes, strict=True)
        ):
            seen = torch.arange(cache.length, device=x.device) <= cache.slot[:, None]
        for own, shape, (keys, values) in zip(self.weights.layers, shapes, cache.layers, strict=True):
            x = llama_layer.decode(x, cos, sin, own, shape, keys, values, cache.slot, seen)
        logits = self.model.get_output_embeddings().forward(self.final_norm(x[:, 0]))
        cache.append(broadcast_first(logits.float().argmax(-1), self.graphs.group))

    def final_norm(self, x: Tensor) -> Tensor:
        """Return hidden states [..., C] as the output head wants them."""
        norm = self.decoder.norm
        return llama_layer.rms_norm(x, norm.weight, norm_epsilon(norm))


def _enough_to_write(layers: Sequence[tuple[int, Tensor, Tensor]]) -> bool:
    """Return whether the keys and values of some layers shall be written into the cache before more are computed."""
    size = sum(keys.nbytes + values.nbytes for _, keys, values in layers)
    return len(layers) >= LAYERS_PER_CACHE_WRITE or size >= BYTES_PER_CACHE_WRITE


def _write_cache(cache: StaticKVCache, state: PrefillState, layers: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    """Write what is left of the keys and values of some layers into their slots."""
    prunes = [state.prunes_before(number) for number, _, _ in layers]
    positions = {count: state.cache_positions(count) for count in set(prunes)}
    for count, (number, keys, values) in zip(prunes, layers, strict=True):
        left = positions[count]
        if left is None:
            cache.fill(number, keys, values)
        else:
            llama_layer.write_cache(*cache.layers[number], keys, values, left)


def layer_states(entered: Tensor, queries: Tensor, keys: Tensor, shape: llama_layer.LayerShape) -> LayerStates:
    """Return what a stage may see of a fused layer, whose attention needs no mask."""

    def attention(query_positions: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        return llama_layer.attention_probs(select(queries), select(keys), query_positions, shape)

    return LayerStates(entered, lambda: keys, attention)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make tensors that outlive the inference mode of a caller."""
    with torch.inference_mode(False), torch.no_grad():
        yield
