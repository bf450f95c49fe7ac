"""What the pruning engine needs to know of LLaVA."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaModel

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

    def extra_hooks(self, decoder: nn.Module) -> list[RemovableHandle]:
        return [
            layer.self_attn.rotary_emb.register_forward_pre_hook(_whole_table, with_kwargs=True)
            for layer in decoder.layers
        ]


def _whole_table(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
    """Let positions reach beyond the cache: this Llama cuts its rotary table to the cache's length.

    Kept tokens keep their positions, so after a prune the table has to be the one for the whole prompt,
    which is the one the first layer made.
    """
    return args, call | {"seq_len": max(call["seq_len"], module.max_seq_len_cached)}


class LlavaBackbone(LlamaBackbone):
    """LLaVA-1.5: 576 tokens an image."""

    name = "llava"
    models = (LlavaLlamaForCausalLM,)
    nominal_tokens = 576


register_backbone(LlavaBackbone())
