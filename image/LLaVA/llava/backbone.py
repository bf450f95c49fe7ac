"""What the pruning engine needs to know of LLaVA."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaModel
from transformers.cache_utils import DynamicCache

from llava.model.llava_llama import LlavaLlamaForCausalLM
from strategy import Asked, Backbone, Layout, register_backbone
from strategy.cache import length as cache_length


class LlamaBackbone(Backbone):
    """Whatever transformers 4.37's Llama decodes."""

    decoders = (LlamaModel,)

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()

    def entry(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()

    def layout(self, model: nn.Module, call: Mapping[str, Any]) -> Layout | None:
        return call.get("visual_layout")

    def closing(self, model: Any, call: Mapping[str, Any]) -> list[int]:
        tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        return [model.closing] * len(tokens)

    def rotary(self, layer: nn.Module, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tables = layer.self_attn.rotary_emb(layer.input_layernorm.weight, seq_len=1)
        return tuple(table[call["position_ids"]] for table in tables)

    def angles(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        # All of this Llama's layers have the same table.
        return self.rotary(decoder.layers[0], {"position_ids": positions})

    def greedy(self, model: Any, answer: Callable[[Callable[[Any], Tensor], Asked], Tensor]) -> dict[str, Any]:
        return {"greedy_search": partial(_search, model.greedy_search, answer)}

    def extra_hooks(self, decoder: Any) -> list[RemovableHandle]:
        # By thread, since each may be in a forward call of its own.
        here = threading.local()

        def begin(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            cache = call.get("past_key_values")
            wanted = call.get("use_cache")
            if cache is None and (decoder.config.use_cache if wanted is None else wanted):
                # The tuple this Llama makes of old does not tell how many tokens it saw, only what it holds.
                cache = DynamicCache()
            tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
            here.seen = getattr(cache, "seen_tokens", 0) + tokens.shape[1]
            held, new, mask = cache_length(cache), tokens.shape[1], call.get("attention_mask")
            flash = decoder.config._attn_implementation == "flash_attention_2"
            if held and new > 1 and mask is not None and mask.dim() == 2 and not flash:
                # Under sdpa this Llama cannot pad several tokens that follow a cache.
                causal = torch.ones(new, held + new, dtype=decoder.dtype, device=mask.device).tril(held)
                call["attention_mask"] = mask[:, None, None] * causal
            return args, call | {"past_key_values": cache}

        def end(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any], output: Any) -> None:
            if isinstance(cache := call.get("past_key_values"), DynamicCache):
                # It counted what the first layer was given, which a prune before it made fewer.
                cache.seen_tokens = here.seen

        def whole_table(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            # This Llama cuts its rotary table to the cache's length, but kept tokens keep their positions.
            return args, call | {"seq_len": max(call["seq_len"], module.max_seq_len_cached, here.seen)}

        tables = [layer.self_attn.rotary_emb for layer in decoder.layers]
        return [
            decoder.register_forward_pre_hook(begin, with_kwargs=True),
            decoder.register_forward_hook(end, with_kwargs=True),
            *(table.register_forward_pre_hook(whole_table, with_kwargs=True) for table in tables),
        ]


def _search(
    stock: Callable[..., Tensor],
    answer: Callable[[Callable[[Any], Tensor], Asked], Tensor],
    ids: Tensor,
    stopping_criteria: Any = (),
    **call: Any,
) -> Tensor:
    """`greedy_search`, the loop of transformers 4.37's `generate`, or `answer` in its place."""
    model, embeddings = stock.__self__, call.get("inputs_embeds")  # type: ignore[attr-defined]
    # None is no wish but a gap, which that loop fills from the model's own configuration.
    ends, pad = (
        getattr(model.generation_config, name) if call.get(name) is None else call[name]
        for name in ("eos_token_id", "pad_token_id")
    )
    extra = ("output_scores", "return_dict_in_generate", "synced_gpus", "streamer")
    extra += ("output_attentions", "output_hidden_states")
    asked = Asked(
        prompt=(ids if embeddings is None else embeddings).shape[1],
        ids=ids.shape[1],
        processors=call.get("logits_processor") or (),
        criteria=stopping_criteria,
        ends=[ends] if isinstance(ends, int) else ends or [],
        pad=pad,
        cache=call.get("past_key_values"),
        plain=not any(call.get(name) for name in extra) and call.get("use_cache") is not False,
    )
    return answer(lambda criteria: stock(ids, stopping_criteria=criteria, **call), asked)


class LlavaBackbone(LlamaBackbone):
    """LLaVA-1.5: 576 tokens an image."""

    name = "llava"
    models = (LlavaLlamaForCausalLM,)
    nominal_tokens = 576

    def vision(self, model: LlavaLlamaForCausalLM) -> list[nn.Module]:
        return [part for part in (model.model.vision_tower, model.model.mm_projector) if part is not None]


register_backbone(LlavaBackbone())
