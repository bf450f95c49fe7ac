"""What a worker knows of pruned requests, kept where Model Runner V2 keeps the state of requests."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from strategy.backbone import Span, template_length
from vllm_vtr import versions
from vllm_vtr.configuration import NO_FLASHINFER, NOMINAL_TOKENS, Pruning, pruning_of
from vllm_vtr.families import family_of
from vllm_vtr.metrics import ScoringSeconds
from vllm_vtr.prefill import Prompt, PruningPrefill
from vllm_vtr.tower import TowerRecorder

logger = init_logger("vllm.vtr")


class Visuals(NamedTuple):
    """What a request shows: the length of its prompt, and what will be pruned, if anything.

    spans: Of the pictures and videos in the prompt. names: By which vLLM's encoder cache holds their embeddings.
    template: How many of the prompt's last tokens are those of a template, for strategies that leave the question out.
    """

    prompt: int
    spans: list[Span]
    names: list[str]
    template: int


class AttentionCall(NamedTuple):
    """The arguments of `prepare_attn`, for calls in the middle of a forward pass."""

    block_tables: tuple[Tensor, ...]
    attn_groups: Any
    kv_cache_config: Any


class Check(NamedTuple):
    """Whether a step's scores and selections were sound, on its way to the host, and whose prompts these were."""

    sound: Tensor
    arrived: torch.cuda.Event | None
    requests: list[str]


class PruningModelState(DefaultModelState):
    """Keeps apart where a token stands in its text and where it lies in the cache, which holds fewer.

    Positions, which rotate queries and keys, and the lengths by which vLLM samples and schedules count every token.
    Only attention and the slots that it writes to count what the cache holds.

    Attributes:
        evicted: [slots], by request, how many tokens of its prompt the cache does not hold; `evicted_host` has the same
            numbers on the host.
        scoring_seconds: Reports the seconds of scoring with each step's output.
        prefill: Runs the prompts of the present step that are to be pruned; None if there are none.
    """

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        attn = model.language_model.model.layers[0].self_attn.attn
        if attn.attn_backend.get_name() == AttentionBackendEnum.FLASHINFER.name:  # where vLLM chooses itself
            raise ValueError(f"vtr: {NO_FLASHINFER}")
        versions.extend_runner()
        self.family = family_of(model.config)
        self.end_of_turn = self.family.end_of_turn(vllm_config.model_config)
        self.visuals: dict[int, Visuals] = {}
        self.evicted = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.evicted_host = np.zeros(self.max_num_reqs, dtype=np.int32)
        # Graphs read this address.
        self.cache_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.prefill: PruningPrefill | None = None
        self.checks: list[Check] = []
        self.methods = versions.uncompiled_methods(model.language_model.model)
        self.prune_by(pruning_of(vllm_config))
        self.scoring_seconds = ScoringSeconds(lambda: self.runner.record.clock)
        model.state = self

    def prune_by(self, pruning: Pruning) -> None:
        """Prune as is asked from now on."""
        self.pruning, strategy = pruning, pruning.strategy
        self.runner = PruningPrefill.stage_runner(pruning, self.model)
        self.tower = None
        if strategy.encoder_layer is not None:
            name = strategy.config.strategy
            self.tower = TowerRecorder(self.family.tower, strategy.encoder_layer, name, self.model)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Keep what the cache is made of, once it is made."""
        self.kv_cache_config, self.block_tables = kv_cache_config, block_tables

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        features, prompt = new_req_data.mm_features, len(new_req_data.prompt_token_ids)
        spans: list[Span] = []
        if self.pruning.evicted(prompt, features, new_req_data.sampling_params):
            spans = [self.family.span(self.model.config, feature) for feature in features]
        names = [feature.identifier for feature in features]
        template = 0
        if self.pruning.strategy.question_free and self.end_of_turn is not None:
            template = template_length(new_req_data.prompt_token_ids, self.end_of_turn)
        self.visuals[req_index] = Visuals(prompt, spans, names, template)
        self._evict([req_index], [0])

    def preprocess_state(
        self, input_batch: Any, block_tables: tuple[Tensor, ...], kv_cache_config: Any, num_computed_tokens: Tensor
    ) -> None:
        """Move what follows pruned prompts to where it lies in the cache, and find the prompts to prune."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        self._report()
        if self.evicted_host[input_batch.idx_mapping_np].any():
            # In place, since graphs read the buffer that this writes.
            self.slot_mappings(input_batch, self.places(input_batch))
        rows = zip(input_batch.idx_mapping_np.tolist(), input_batch.num_scheduled_tokens.tolist(), strict=False)
        prompts = [
            Prompt(row, slot, int(input_batch.query_start_loc_np[row]), scheduled, shown.spans, shown.template)
            for row, (slot, scheduled) in enumerate(rows)
            if (shown := self.visuals[slot]).spans and not input_batch.num_computed_tokens_np[row]
        ]
        self.prefill = PruningPrefill(self, input_batch, prompts) if prompts else None

    def reserve(self, tokens: int) -> Tensor | None:
        """Return as much memory as a step of so many tokens keeps for early layers, while vLLM looks how much it needs.

        Otherwise the cache would get that memory.
        """
        if get_forward_context().attn_metadata is not None:
            return None
        plan, attn = self.pruning.plan, self.model.language_model.model.layers[0].self_attn.attn
        left, cells = (NOMINAL_TOKENS, *plan.kept(NOMINAL_TOKENS)), 0.0
        for stage, (first, behind) in enumerate(itertools.pairwise((0, *plan.layers))):
            cells += (behind - first) * left[stage] / NOMINAL_TOKENS
        width = 2 * attn.num_kv_heads * attn.head_size
        return torch.empty(int(cells * tokens), width, dtype=self.dtype, device=self.device)

    def shown(self, prompts: Sequence[Prompt]) -> list[list[Tensor]]:
        """Return the embeddings of each prompt's pictures and videos, in order."""
        cached = self.encoder_cache.encoder_outputs
        return [[cached[name] for name in self.visuals[prompt.slot].names] for prompt in prompts]

    def places(self, input_batch: Any) -> Tensor:
        """Return the places [tokens, padding included] of a batch's tokens in the caches of their requests."""
        count, ends = input_batch.num_tokens, input_batch.query_start_loc[: input_batch.num_reqs + 1]
        places = input_batch.positions.clone()
        places[:count] -= self.evicted[input_batch.idx_mapping].long().repeat_interleave(ends.diff(), output_size=count)
        return places

    def slot_mappings(self, input_batch: Any, places: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the slots [cache groups, tokens] of a batch's tokens; `out` is None for those that graphs read."""
        return self.block_tables.compute_slot_mappings(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            places,
            num_tokens_padded=input_batch.num_tokens_after_padding,
            out=out,
        )

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        slots, rows = input_batch.idx_mapping_np, input_batch.num_reqs
        lens = self.cache_lens[: len(input_batch.seq_lens)].copy_(input_batch.seq_lens)
        most = input_batch.seq_lens_cpu_upper_bound
        if not for_capture and self.evicted_host[slots].any():
            lens[:rows] -= self.evicted[input_batch.idx_mapping]
            most = most.clone()
            most[:rows] -= torch.from_numpy(self.evicted_host[slots])
        batch = replace(input_batch, seq_lens=lens, seq_lens_cpu_upper_bound=most)
        if self.prefill is not None:
            self.prefill.batch = batch
            self.prefill.call = AttentionCall(block_tables, attn_groups, kv_cache_config)
        return super().prepare_attn(
            batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture, **more
        )

    def attention_over(self, batch: Any, places: Tensor, call: AttentionCall) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the attention metadata and the slots, by layer, of a batch that has become shorter."""
        slots = self.slot_mappings(batch, places, torch.empty_like(self.block_tables.slot_mappings))
        metadata = super().prepare_attn(
            batch, CUDAGraphMode.NONE, call.block_tables, slots, call.attn_groups, call.kv_cache_config
        )
        return metadata, build_slot_mappings_by_layer(slots, call.kv_cache_config)

    def finish(self, prompts: Sequence[Prompt], left: Sequence[int], sound: Tensor | bool) -> None:
        """Keep what the cache now holds of pruned prompts, and let the blocks behind that be given to others.

        Args:
            prompts: The prompts.
            left: How many tokens of each are left.
            sound: Whether their scores were finite, and the selections of their tokens valid.
        """
        assert self.prefill is not None
        if isinstance(sound, Tensor):
            names = [self.prefill.batch.req_ids[prompt.row] for prompt in prompts]
            arrived = torch.cuda.Event() if sound.is_cuda else None
            self.checks.append(Check(sound.to("cpu", non_blocking=True), arrived, names))
            if arrived is not None:
                arrived.record()
        self.prefill = None
        slots = [prompt.slot for prompt in prompts]
        self._evict(slots, [prompt.length - own for prompt, own in zip(prompts, left, strict=True)])
        tables = self.block_tables
        for group, held in enumerate(tables.num_blocks.np):
            for slot, own in zip(slots, left, strict=True):
                # The scheduler has freed the same ones; the next that it adds stands behind those that are left.
                held[slot] = min(held[slot], versions.blocks_for(tables, group, own))

    def _report(self) -> None:
        """Log whose prompts were not sound, without waiting for those whose check is on its way."""
        waiting = []
        for check in self.checks:
            if check.arrived is not None and not check.arrived.query():
                waiting.append(check)
            elif not check.sound:
                logger.error(
                    "vtr: features or scores of %s were not finite, or strategy=%s selected other things than tokens "
                    "in order: do not trust the answers to %s; look at the pictures and the weights, or compute in "
                    "bfloat16.",
                    "one of these prompts" if len(check.requests) > 1 else "this prompt",
                    self.pruning.strategy.config.strategy,
                    ", ".join(check.requests),
                )
        self.checks = waiting

    def _evict(self, slots: Sequence[int], evicted: Sequence[int]) -> None:
        if (self.evicted_host[slots] != evicted).any():
            self.evicted_host[slots] = evicted
            given = torch.tensor([slots, evicted], dtype=torch.int32)
            index, values = (given.pin_memory() if given.device != self.device else given).to(
                self.device, non_blocking=True
            )
            self.evicted[index] = values
