"""The backbone of LLaVA-1.5, and what every Llama of transformers 4.37 has in common."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaModel
from transformers.cache_utils import DynamicCache
from transformers.models.clip.modeling_clip import CLIPAttention

from llava.model.clip_attention import clip_forward
from llava.model.clip_text import load_joint_space
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.prompts import question_ids
from strategy import Backbone, GreedyRequest, Layout, register_backbone
from strategy.backbone import EncoderSpec, FasterMethod, Generate, JointSpace
from strategy.kernels.kv_cache import length as cache_length


class LlamaBackbone(Backbone):
    """A model family whose decoder is the Llama of transformers 4.37."""

    decoders = (LlamaModel,)

    def decoder(self, model: Any) -> nn.Module:
        return model.get_decoder()

    def entry(self, model: Any) -> nn.Module:
        return model.get_decoder()

    def layout(self, model: nn.Module, kwargs: Mapping[str, Any]) -> Layout | None:
        return kwargs.get("visual_layout")

    def visual_samples(self, model: nn.Module, kwargs: Mapping[str, Any]) -> int:
        return sum(map(bool, kwargs.get("visual_layout") or []))

    def num_template_tokens(self, model: Any, kwargs: Mapping[str, Any]) -> list[int]:
        return [model.num_template_tokens] * len(_tokens(kwargs))

    def rotary(self, layer: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        cos, sin = layer.self_attn.rotary_emb(layer.input_layernorm.weight, seq_len=1)
        return cos[kwargs["position_ids"]], sin[kwargs["position_ids"]]

    def rotary_at(self, decoder: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        # All layers of this Llama have the same tables.
        return self.rotary(decoder.layers[0], {"position_ids": positions})

    def faster_methods(self, model: Any) -> list[FasterMethod]:
        inside = chain.from_iterable(tower.modules() for tower in self.vision(model))
        return [(module, "forward", clip_forward) for module in inside if type(module) is CLIPAttention]

    def greedy_loop(self, model: Any, generate: Generate) -> dict[str, Any]:
        return {"greedy_search": partial(_greedy_search, model.greedy_search, generate)}

    def extra_hooks(self, decoder: Any) -> list[RemovableHandle]:
        # Each thread may be in a forward call of its own.
        here = threading.local()

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = kwargs.get("past_key_values")
            use_cache = kwargs.get("use_cache")
            if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
                # Otherwise this Llama makes a tuple, which does not count the tokens that were seen.
                cache = DynamicCache()
            held, new, mask = cache_length(cache), _tokens(kwargs).shape[1], kwargs.get("attention_mask")
            here.seen = getattr(cache, "seen_tokens", 0) + new
            flash = decoder.config._attn_implementation == "flash_attention_2"
            if held and new > 1 and mask is not None and mask.dim() == 2 and not flash:
                # With sdpa this Llama cannot combine padding with several tokens that follow a cache.
                causal = torch.ones(new, held + new, dtype=decoder.dtype, device=mask.device).tril(held)
                kwargs["attention_mask"] = mask[:, None, None] * causal
            return args, kwargs | {"past_key_values": cache}

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(cache := kwargs.get("past_key_values"), DynamicCache):
                # The cache counts the tokens that enter the first layer, and a prune before that layer removes some.
                cache.seen_tokens = here.seen

        def extend_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # This Llama cuts its rotary tables to the cache's length, but kept tokens keep their position ids.
            return args, kwargs | {"seq_len": max(kwargs["seq_len"], module.max_seq_len_cached, here.seen)}

        tables = [layer.self_attn.rotary_emb for layer in decoder.layers]
        return [
            decoder.register_forward_pre_hook(begin, with_kwargs=True),
            decoder.register_forward_hook(end, with_kwargs=True),
            *(table.register_forward_pre_hook(extend_table, with_kwargs=True) for table in tables),
        ]


def _tokens(kwargs: Mapping[str, Any]) -> Tensor:
    """Return the token ids [B, L] or embeddings [B, L, C] that a forward call is given."""
    embeddings = kwargs.get("inputs_embeds")
    return kwargs["input_ids"] if embeddings is None else embeddings


# Arguments of `greedy_search` that ask for more than token ids.
OTHER_OUTPUTS = (
    "output_scores",
    "return_dict_in_generate",
    "synced_gpus",
    "streamer",
    "output_attentions",
    "output_hidden_states",
)


def _greedy_search(
    stock: Callable[..., Tensor],
    generate: Generate,
    ids: Tensor,
    stopping_criteria: Any = (),
    **kwargs: Any,
) -> Tensor:
    """Replace `greedy_search`, the loop of transformers 4.37's `generate`."""
    model, embeddings = stock.__self__, kwargs.get("inputs_embeds")  # type: ignore[attr-defined]
    # The stock loop replaces None by the value of the model's own configuration.
    eos_ids, pad_id = (
        getattr(model.generation_config, name) if kwargs.get(name) is None else kwargs[name]
        for name in ("eos_token_id", "pad_token_id")
    )
    request = GreedyRequest(
        prompt_length=(ids if embeddings is None else embeddings).shape[1],
        num_ids=ids.shape[1],
        processors=kwargs.get("logits_processor") or (),
        stopping_criteria=stopping_criteria,
        eos_ids=[eos_ids] if isinstance(eos_ids, int) else eos_ids or [],
        pad_id=pad_id,
        cache=kwargs.get("past_key_values"),
        token_ids_only=not any(kwargs.get(name) for name in OTHER_OUTPUTS) and kwargs.get("use_cache") is not False,
    )

    def loop(criteria: Any) -> Tensor:
        # For a single token nobody asks whether it ends the answer, and copying end tokens would wait for a GPU.
        asks = criteria is stopping_criteria or not request.eos_ids
        return stock(ids, stopping_criteria=criteria, **kwargs if asks else kwargs | {"eos_token_id": []})

    return generate(loop, request)


class LlavaBackbone(LlamaBackbone):
    """LLaVA-1.5: 576 tokens an image."""

    name = "llava"
    models = (LlavaLlamaForCausalLM,)
    nominal_tokens = 576

    def vision(self, model: LlavaLlamaForCausalLM) -> list[nn.Module]:
        return [part for part in (model.model.vision_tower, model.model.mm_projector) if part is not None]

    def encoder(self, model: LlavaLlamaForCausalLM) -> EncoderSpec | None:
        if model.model.vision_tower is None:
            return None
        clip = model.model.vision_tower.vision_tower
        layers, heads = clip.vision_model.encoder.layers, clip.config.num_attention_heads
        return EncoderSpec(layers, query="self_attn.q_proj", key="self_attn.k_proj", heads=heads)

    def joint_space(self, model: LlavaLlamaForCausalLM, clip_text: str) -> JointSpace:
        return load_joint_space(clip_text, model.get_vision_tower())

    def questions(self, model: LlavaLlamaForCausalLM, kwargs: Mapping[str, Any]) -> list[str] | None:
        if kwargs.get("prompt_ids") is None or model.tokenizer is None:
            return None
        asked, template = question_ids(*kwargs["prompt_ids"]), model.num_template_tokens
        texts = [model.tokenizer.decode(ids[: len(ids) - template], skip_special_tokens=True).strip() for ids in asked]
        # Prompts are repeated for beams, each one in place.
        return [text for text in texts for _ in range(len(_tokens(kwargs)) // len(texts))]


register_backbone(LlavaBackbone())
