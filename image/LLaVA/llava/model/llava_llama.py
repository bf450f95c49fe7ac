"""LLaVA on the stock Llama of transformers: features of pictures become embeddings of the prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava.model.prompts import Visual, embed_prompts, positions, spans_behind
from llava.model.vision_tower import CLIPVisionTower
from llava.pixels import joined_pixel_values
from strategy import Layout
from strategy.kernels.kv_cache import length as cache_length
from strategy.kernels.transfers import host_copy, remembering, to_device

Images = Tensor | Sequence[Tensor] | None
PromptIds = tuple[Tensor, Tensor | None] | None
"""Token ids [B, S] of the prompts and their mask, as the caller gave them; None where only embeddings were given."""


class LlavaConfig(LlamaConfig):
    """A Llama configuration with LLaVA's `mm_` fields."""

    model_type = "llava"


class LlavaLlamaModel(LlamaModel):
    """The decoder, with the projector whose weights the checkpoint keeps among its own."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.mm_projector = build_projector(config)
        self.vision_tower: CLIPVisionTower | None = None

    def forward(
        self, *args: Any, visual_layout: Layout | None = None, prompt_ids: PromptIds = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Call the stock forward; `visual_layout` and `prompt_ids` are there for hooks of this module."""
        return super().forward(*args, **kwargs)


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """LLaVA for inference.

    Pictures replace the `IMAGE_TOKEN_INDEX` entries of `input_ids`, in order over the whole batch. Prompts of a batch
    are padded on the left, so that every prompt's last token is its row's last.

    Attributes:
        num_template_tokens: How many tokens of the template end every prompt.
        tokenizer: Decodes prompts, for strategies that compare texts; None if the model was not loaded from a folder.
    """

    config_class = LlavaConfig
    num_template_tokens = 0
    tokenizer: Any = None

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_vision_tower(self) -> CLIPVisionTower:
        """Return the vision tower; raise ValueError if none was loaded."""
        if self.model.vision_tower is None:
            raise ValueError("this model has no vision tower: load it with load_pretrained_model")
        return self.model.vision_tower

    def encode_images(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the visual tokens [count, N, hidden size] of pictures.

        Args:
            images: Pixel values [count, 3, side, side]; or a list of these, of [3, side, side], and of square pictures
                [side, side, 3] uint8.
        """
        if not isinstance(images, Tensor):
            tower = self.get_vision_tower()
            images = joined_pixel_values(images, tower.image_processor, tower.vision_tower.device)
        return self.project(self.get_vision_tower()(images.flatten(0, -4)))

    def project(self, features: Tensor) -> Tensor:
        """Project a tower's features [..., width] to embeddings of the decoder, [..., hidden size]."""
        projector = self.model.mm_projector
        return projector(features.to(next(projector.parameters())))

    def encode(self, images: Tensor | Sequence[Tensor]) -> list[Visual]:
        """Return the visual tokens of each picture."""
        grid = self.get_vision_tower().grid
        return [Visual([tokens], grid) for tokens in self.encode_images(images)]

    def embed_prompts(
        self, input_ids: Tensor, attention_mask: Tensor | None, images: Images
    ) -> tuple[Tensor, Tensor, Layout]:
        """Embed prompts with their pictures; see `llava.model.prompts.embed_prompts`."""
        device = input_ids.device
        # The host reads them before a GPU is busy with the pictures, since reading waits for it.
        ids, real = host_copy(input_ids), None if attention_mask is None else host_copy(attention_mask)
        visuals = [] if images is None or len(images) == 0 else self.encode(images)
        return embed_prompts(self.get_input_embeddings(), ids, real, visuals, device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images = None,
        image_sizes: Any = None,
        visual_layout: Layout | None = None,
        prompt_ids: PromptIds = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return the logits [B, L, vocabulary] of prompts, or of what follows a cache.

        Args:
            input_ids: Token ids [B, L].
            attention_mask: A mask [B, L], 0 at padding.
            position_ids: Positions [B, L]; those of the tokens that are no padding if not given.
            past_key_values: The cache.
            inputs_embeds: Embeddings [B, L, C] in place of token ids.
            use_cache: Whether to fill a cache.
            output_attentions: As in transformers.
            output_hidden_states: As in transformers.
            images: The processed pictures of the prompts.
            image_sizes: Ignored; callers pass it, but pictures are always square here.
            visual_layout: Where visual tokens lie in `inputs_embeds`.
            prompt_ids: What `inputs_embeds` was made of.
            return_dict: Ignored; the output always has named fields.

        Raises:
            ValueError: There are neither token ids nor embeddings; and as for `embed_prompts`.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        if inputs_embeds is None and not cache_length(past_key_values):
            prompt_ids = tokens, attention_mask
            tokens, attention_mask, visual_layout = self.embed_prompts(tokens, attention_mask, images)
            input_ids, inputs_embeds = None, tokens
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask)[:, -tokens.shape[1] :]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            visual_layout=visual_layout,
            prompt_ids=prompt_ids,
            return_dict=True,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state).float(),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images = None,
        image_sizes: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue prompts [B, S] and return the new tokens only.

        Args:
            inputs: Token ids with `IMAGE_TOKEN_INDEX` for each picture; `input_ids` is another name. With the cache of
                an earlier call as past_key_values, these are the whole conversation so far.
            images: All pictures in the prompts.
            image_sizes: Ignored; callers pass it, but pictures are always square here.
            attention_mask: A mask [B, S], 0 at padding.
            kwargs: As in transformers' `generate`.

        Raises:
            ValueError: Prompts and pictures do not match, or there are no token ids.
        """
        inputs = kwargs.pop("input_ids", inputs)
        if inputs is None:
            raise ValueError("generate needs the prompts' token ids, as inputs or input_ids")
        with remembering():
            embeddings, mask, layout = self.embed_prompts(to_device(inputs, self.device), attention_mask, images)
            # Without token ids, generate would begin the answer with a token of its own.
            none = inputs.new_empty(len(inputs), 0, device=self.device)
            given = {"inputs_embeds": embeddings, "visual_layout": layout, "prompt_ids": (inputs, attention_mask)}
            return super().generate(none, attention_mask=mask, **given, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_layout: Layout | None = None,
        prompt_ids: PromptIds = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the keyword arguments of the next forward call of `generate`."""
        arguments = {"attention_mask": attention_mask, "use_cache": use_cache, "past_key_values": past_key_values}
        # The count of tokens seen, unlike the cache's length, includes pruned tokens.
        new = attention_mask.shape[1] - getattr(past_key_values, "seen_tokens", cache_length(past_key_values))
        arguments["position_ids"] = positions(attention_mask)[:, -new:]
        if new <= input_ids.shape[1]:
            return arguments | {"input_ids": input_ids[:, -new:]}
        if inputs_embeds is None or visual_layout is None:
            raise ValueError("the attention mask is longer than input_ids: pass inputs_embeds and visual_layout too")
        if input_ids.shape[1]:
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(input_ids)], dim=1)
        beams = len(inputs_embeds) // len(visual_layout)
        held = inputs_embeds.shape[1] - new
        return arguments | {
            "inputs_embeds": inputs_embeds[:, -new:],
            "visual_layout": [spans_behind(spans, held) for spans in visual_layout for _ in range(beams)],
            "prompt_ids": prompt_ids,
        }


def build_projector(config: LlavaConfig) -> nn.Sequential:
    """Return the projector that `mm_projector_type` names; raise ValueError for one that LLaVA-1.5 does not have."""
    kind, width = getattr(config, "mm_projector_type", "linear"), config.hidden_size
    if kind == "linear":
        return nn.Sequential(nn.Linear(config.mm_hidden_size, width))
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width))
    raise ValueError(f"mm_projector_type={kind!r}: allowed are 'linear' and 'mlp2x_gelu'")
