"""What the pruning engine needs to know of LLaVA."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaModel
from transformers.cache_utils import DynamicCache

from llava.model.llava_llama import LlavaLlamaForCausalLM
from strategy import Backbone, Layout, register_backbone


class LlamaBackbone(Backbone):
    """Whatever transformers 4.37's Llama decodes."""

    decoders = (LlamaModel,)

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()

    def entry(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()

    def layout(self, model: nn.Module, call: Mapping[str, Any]) -> Layout | None:
        return call.get("visual_layout")

    def rotary(self, layer: nn.Module, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        positions = call["position_ids"]
        tables = layer.self_attn.rotary_emb(layer.input_layernorm.weight, seq_len=1)
        return tuple(table[positions] for table in tables)

    def extra_hooks(self, decoder: Any) -> list[RemovableHandle]:
        seen = 0

        def begin(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            nonlocal seen
            cache = call.get("past_key_values")
            wanted = call.get("use_cache")
            if cache is None and (decoder.config.use_cache if wanted is None else wanted):
                # The tuple this Llama makes of old does not tell how many tokens it saw, only what it holds.
                cache = DynamicCache()
            tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
            seen = getattr(cache, "seen_tokens", 0) + tokens.shape[1]
            return args, call | {"past_key_values": cache}

        def whole_table(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
            # This Llama cuts its rotary table to the cache's length, but kept tokens keep their positions.
            return args, call | {"seq_len": max(call["seq_len"], module.max_seq_len_cached, seen)}

        tables = [layer.self_attn.rotary_emb for layer in decoder.layers]
        return [
            decoder.register_forward_pre_hook(begin, with_kwargs=True),
            *(table.register_forward_pre_hook(whole_table, with_kwargs=True) for table in tables),
        ]


class LlavaBackbone(LlamaBackbone):
    """LLaVA-1.5: 576 tokens an image."""

    name = "llava"
    models = (LlavaLlamaForCausalLM,)
    nominal_tokens = 576


register_backbone(LlavaBackbone())
