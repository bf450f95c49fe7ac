"""What the models share that transformers answers with its own `generate`, since version 4.48."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strategy import Backbone, GreedyRequest
from strategy.backbone import Generate, template_length
from strategy.kernels import kv_cache
from strategy.kernels.transfers import host_copy

PIXELS = ("pixel_values", "pixel_values_videos")


class ConditionalGenerationBackbone(Backbone):
    """A `...ForConditionalGeneration`, whose `model.language_model` is its decoder.

    Placeholder tokens in the prompt stand for visual tokens.
    """

    def decoder(self, model: Any) -> nn.Module:
        return model.model.language_model

    def entry(self, model: Any) -> nn.Module:
        return model.model

    def rotary(self, layer: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return kwargs["position_embeddings"]

    def greedy_loop(self, model: Any, generate: Generate) -> dict[str, Any]:
        return {"generate": partial(_generate, model.generate, generate)}

    def placeholder_ids(self, model: Any) -> list[int]:
        """Return the ids of the tokens that stand for visual tokens: those of pictures, then those of videos."""
        names = ("image_token_id", "video_token_id")
        return [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]

    def num_template_tokens(self, model: Any, kwargs: Mapping[str, Any]) -> list[int] | None:
        # The question's turn ends with the token that answers end with too.
        eos_ids = model.generation_config.eos_token_id
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or eos_ids is None:
            return None
        end = eos_ids[0] if isinstance(eos_ids, list) else eos_ids
        ids = host_copy(ids)
        real = host_copy(mask) if mask is not None and mask.dim() == 2 else torch.ones_like(ids)
        pairs = zip(ids.tolist(), real.tolist(), strict=True)
        rows = [[t for t, is_real in zip(*pair, strict=True) if is_real] for pair in pairs]
        return [template_length(row, end) for row in rows]

    def visual_samples(self, model: Any, kwargs: Mapping[str, Any]) -> int:
        ids = kwargs.get("input_ids")
        if ids is None:
            return len(kwargs["inputs_embeds"]) if any(kwargs.get(name) is not None for name in PIXELS) else 0
        ids = host_copy(ids)
        return int(torch.stack([ids == each for each in self.placeholder_ids(model)]).any(0).any(1).sum())


# Options of `generate` that ask for another loop than the greedy one. transformers does not pass all of them to a
# custom loop.
OTHER_LOOPS = (
    "do_sample",
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "constraints",
    "force_words_ids",
)
OTHER_ARGUMENTS = ("custom_generate", "streamer", "assistant_model", "tokenizer", "synced_gpus")
# Options of `generate` that ask for more than token ids, or for another prefill.
OTHER_OUTPUTS = (
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "prefill_chunk_size",
)


def _generate(
    stock: Callable[..., Any],
    generate: Generate,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the stock `generate`, with the loop `_loop` in place of the greedy one."""
    model = stock.__self__  # type: ignore[attr-defined]
    config = kwargs.get("generation_config") or model.generation_config
    wanted = {name: kwargs.get(name, getattr(config, name, None)) for name in (*OTHER_LOOPS, "num_beams")}
    other = any(wanted[name] for name in OTHER_LOOPS) or (wanted["num_beams"] or 1) > 1
    if other or any(map(kwargs.get, OTHER_ARGUMENTS)):
        return stock(*args, **kwargs)
    return stock(*args, custom_generate=partial(_loop, generate), **kwargs)


def _loop(
    generate: Generate,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Tensor:
    """Replace `_sample`, the loop of `generate` since transformers 4.48."""

    def stock(criteria: Any) -> Tensor:
        return type(model)._sample(
            model, input_ids, logits_processor, criteria, generation_config=generation_config, **kwargs
        )

    pad, ends = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    request = GreedyRequest(
        prompt_length=input_ids.shape[1],
        num_ids=input_ids.shape[1],
        processors=logits_processor,
        stopping_criteria=stopping_criteria,
        eos_ids=[] if ends is None else ends.flatten().tolist(),
        pad_id=None if pad is None else int(pad),
        cache=kv_cache.find(kwargs),
        token_ids_only=not any(getattr(generation_config, name, None) for name in OTHER_OUTPUTS)
        and bool(kwargs.get("use_cache")),
    )
    return generate(stock, request)
