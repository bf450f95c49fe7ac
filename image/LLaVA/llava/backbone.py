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
from strategy import Backbone, GreedyRequest, Layout, register_backbone
from strategy.backbone import Generate
from strategy.kernels.kv_cache import length as cache_length


class LlamaBackbone(Backbone):
    """Whatever transformers 4.37's Llama decodes."""

    decoders = (LlamaModel,)

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()

    def entry(self, model: nn.Module) -> nn.Module:
        return model.get_decoder()

    def layout(self, model: nn.Module, kwargs: Mapping[str, Any]) -> Layout | None:
        return kwargs.get("visual_layout")

    def num_template_tokens(self, model: Any, kwargs: Mapping[str, Any]) -> list[int]:
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        return [model.num_template_tokens] * len(tokens)

    def rotary(self, layer: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tables = layer.self_attn.rotary_emb(layer.input_layernorm.weight, seq_len=1)
        return tuple(table[kwargs["position_ids"]] for table in tables)

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        # All layers of this Llama have the same table.
        return self.rotary(decoder.layers[0], {"position_ids": positions})

    def greedy_loop(self, model: Any, generate: Generate) -> dict[str, Any]:
        return {"greedy_search": partial(_search, model.greedy_search, generate)}

    def extra_hooks(self, decoder: Any) -> list[RemovableHandle]:
        # Each thread may be in a forward call of its own.
        here = threading.local()

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = kwargs.get("past_key_values")
            wanted = kwargs.get("use_cache")
            if cache is None and (decoder.config.use_cache if wanted is None else wanted):
                # The tuple that this Llama makes otherwise does not hold how many tokens it saw.
                cache = DynamicCache()
            tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            here.seen = getattr(cache, "seen_tokens", 0) + tokens.shape[1]
            held, new, mask = cache_length(cache), tokens.shape[1], kwargs.get("attention_mask")
            flash = decoder.config._attn_implementation == "flash_attention_2"
            if held and new > 1 and mask is not None and mask.dim() == 2 and not flash:
                # Under sdpa this Llama cannot pad several tokens that follow a cache.
                causal = torch.ones(new, held + new, dtype=decoder.dtype, device=mask.device).tril(held)
                kwargs["attention_mask"] = mask[:, None, None] * causal
            return args, kwargs | {"past_key_values": cache}

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(cache := kwargs.get("past_key_values"), DynamicCache):
                # The cache counted the input of the first layer, which a prune before that layer shortens.
                cache.seen_tokens = here.seen

        def whole_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # This Llama cuts its rotary table to the cache's length, but kept tokens keep their positions.
            return args, kwargs | {"seq_len": max(kwargs["seq_len"], module.max_seq_len_cached, here.seen)}

        tables = [layer.self_attn.rotary_emb for layer in decoder.layers]
        return [
            decoder.register_forward_pre_hook(begin, with_kwargs=True),
            decoder.register_forward_hook(end, with_kwargs=True),
            *(table.register_forward_pre_hook(whole_table, with_kwargs=True) for table in tables),
        ]


def _search(
    stock: Callable[..., Tensor],
    generate: Generate,
    ids: Tensor,
    stopping_criteria: Any = (),
    **kwargs: Any,
) -> Tensor:
    """Replace `greedy_search`, the loop of transformers 4.37's `generate`."""
    model, embeddings = stock.__self__, kwargs.get("inputs_embeds")  # type: ignore[attr-defined]
    # That loop replaces None by the value of the model's own configuration.
    ends, pad = (
        getattr(model.generation_config, name) if kwargs.get(name) is None else kwargs[name]
        for name in ("eos_token_id", "pad_token_id")
    )
    extra = ("output_scores", "return_dict_in_generate", "synced_gpus", "streamer")
    extra += ("output_attentions", "output_hidden_states")
    request = GreedyRequest(
        prompt_length=(ids if embeddings is None else embeddings).shape[1],
        num_ids=ids.shape[1],
        processors=kwargs.get("logits_processor") or (),
        stopping_criteria=stopping_criteria,
        eos_ids=[ends] if isinstance(ends, int) else ends or [],
        pad_id=pad,
        cache=kwargs.get("past_key_values"),
        token_ids_only=not any(kwargs.get(name) for name in extra) and kwargs.get("use_cache") is not False,
    )
    return generate(lambda criteria: stock(ids, stopping_criteria=criteria, **kwargs), request)


class LlavaBackbone(LlamaBackbone):
    """LLaVA-1.5: 576 tokens an image."""

    name = "llava"
    models = (LlavaLlamaForCausalLM,)
    nominal_tokens = 576

    def vision(self, model: LlavaLlamaForCausalLM) -> list[nn.Module]:
        return [part for part in (model.model.vision_tower, model.model.mm_projector) if part is not None]


register_backbone(LlavaBackbone())
