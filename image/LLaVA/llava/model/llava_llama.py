"""LLaVA on the stock Llama of transformers: pictures are projected into the prompt's embeddings."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.vision_tower import CLIPVisionTower
from strategy import Layout, Span
from strategy.kernels.kv_cache import length as cache_length

Images = Tensor | Sequence[Tensor] | None


class Visual(NamedTuple):
    """A picture or a video: its tokens [n, hidden size] behind each of its image tokens, and their grid.

    lead: see `strategy.Span`.
    """

    parts: Sequence[Tensor]
    grid: tuple[int, int, int]
    lead: int = 0


class LlavaConfig(LlamaConfig):
    """A Llama configuration with LLaVA's `mm_` fields beside it."""

    model_type = "llava"


class LlavaLlamaModel(LlamaModel):
    """The decoder, with the projector whose weights the checkpoint keeps beside its own."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.mm_projector = build_projector(config)
        self.vision_tower: CLIPVisionTower | None = None

    def forward(self, *args: Any, visual_layout: Layout | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """The stock forward call; `visual_layout` is there for whoever hooks this module."""
        return super().forward(*args, **kwargs)


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """LLaVA for inference.

    Pictures replace the `IMAGE_TOKEN_INDEX` entries of `input_ids`, in order over the whole batch.
    Prompts of a batch are padded on the left, so every prompt's last token is its row's last.
    num_template_tokens: how many tokens of the template end every prompt.
    """

    config_class = LlavaConfig
    num_template_tokens = 0

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_vision_tower(self) -> CLIPVisionTower:
        """The vision tower; ValueError if none was loaded."""
        if self.model.vision_tower is None:
            raise ValueError("this model has no vision tower: load it with load_pretrained_model")
        return self.model.vision_tower

    def encode_images(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Visual tokens [count, N, hidden size] of pictures [count, 3, side, side], or of a list of them."""
        pixels = images if isinstance(images, Tensor) else torch.cat([i.view(-1, *i.shape[-3:]) for i in images])
        return self.project(self.get_vision_tower()(pixels.flatten(0, -4)))

    def project(self, features: Tensor) -> Tensor:
        """A tower's features [..., width] as embeddings of the decoder, [..., hidden size]."""
        return self.model.mm_projector(features.to(self.model.mm_projector[0].weight))

    def encode(self, images: Tensor | Sequence[Tensor]) -> list[Visual]:
        """What stands for each of the pictures in a prompt."""
        grid = self.get_vision_tower().grid
        return [Visual([tokens], grid) for tokens in self.encode_images(images)]

    def embed_prompts(
        self, input_ids: Tensor, attention_mask: Tensor | None, images: Images
    ) -> tuple[Tensor, Tensor, Layout]:
        """Embeddings [B, L, C], attention mask [B, L] and visual layout of prompts with pictures in them.

        Raises ValueError if the prompts ask for more or fewer pictures than there are.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        # Padding on either side goes; what lies between the turns of a conversation stays, as the cache has it.
        spread = [(int(row.argmax()), row.shape[0] - int(row.flip(0).argmax())) for row in real.bool().int()]
        prompts = [ids[first:end] for ids, (first, end) in zip(input_ids, spread, strict=True)]
        wanted = sum(int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in prompts)
        visuals = [] if images is None or len(images) == 0 else self.encode(images)
        there = sum(len(visual.parts) for visual in visuals)
        if wanted != there:
            raise ValueError(f"the prompts have {wanted} image tokens, but {there} images were given")
        embed = self.get_input_embeddings()
        queue = ((visual, number, part) for visual in visuals for number, part in enumerate(visual.parts))
        rows, masks, layout = [], [], []
        for ids, here, (first, _) in zip(prompts, real, spread, strict=True):
            parts: list[Tensor] = []
            seen: list[Tensor] = []
            spans: list[Span] = []
            borders = [-1, *(ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist(), len(ids)]
            for number, (before, at) in enumerate(itertools.pairwise(borders)):
                if number:
                    visual, place, part = next(queue)
                    start = sum(map(len, parts))
                    if place:  # a later frame of the video before it
                        spans[-1] = spans[-1]._replace(start=(*spans[-1].start, start))
                    else:
                        spans.append(Span((start,), visual.grid, visual.lead))
                    parts.append(part.to(embed.weight.device))
                    seen.append(here.new_ones(len(part)))
                parts.append(embed(ids[before + 1 : at]))
                seen.append(here[first + before + 1 : first + at])
            rows.append(torch.cat(parts))
            masks.append(torch.cat(seen))
            layout.append(spans)
        length = max(map(len, rows))
        embeddings = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
        mask = torch.zeros(len(rows), length, dtype=torch.long, device=embeddings.device)
        for number, (row, spans) in enumerate(zip(rows, layout, strict=True)):
            pad = length - len(row)
            embeddings[number, pad:], mask[number, pad:] = row, masks[number]
            layout[number] = [span._replace(start=tuple(pad + start for start in span.start)) for span in spans]
        return embeddings, mask, layout

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
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocabulary] of prompts, or of what follows a cache.

        `images` are the processed pictures of the prompts. `image_sizes` and `return_dict` are taken for
        callers' sake: pictures are always square here, and the output is always a named one.
        """
        if inputs_embeds is None and not cache_length(past_key_values):
            inputs_embeds, attention_mask, visual_layout = self.embed_prompts(input_ids, attention_mask, images)
            input_ids = None
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            new = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            position_ids = positions(attention_mask)[:, -new:]
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
        """Continue prompts [B, S]; returns the new tokens only.

        inputs (or input_ids=): token ids with `IMAGE_TOKEN_INDEX` for each picture. Everything else is as
        in transformers' `generate`: with the cache of an earlier call as past_key_values, the inputs are the
        whole conversation so far, and the images all that are in it. Raises ValueError if prompts and
        pictures do not match.
        """
        inputs = kwargs.pop("input_ids", inputs)
        if inputs is None:
            raise ValueError("generate needs the prompts' token ids, as inputs or input_ids")
        embeddings, mask, layout = self.embed_prompts(inputs.to(self.device), attention_mask, images)
        # Left to itself, generate would invent a first token and return it with the answer.
        none = inputs.new_empty(len(inputs), 0, device=self.device)
        return super().generate(none, inputs_embeds=embeddings, attention_mask=mask, visual_layout=layout, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visual_layout: Layout | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward call of `generate`."""
        call = {"attention_mask": attention_mask, "use_cache": use_cache, "past_key_values": past_key_values}
        # The count of tokens seen, unlike the cache's length, has those that were pruned in it.
        new = attention_mask.shape[1] - getattr(past_key_values, "seen_tokens", cache_length(past_key_values))
        call["position_ids"] = positions(attention_mask)[:, -new:]
        if new <= input_ids.shape[1]:
            return call | {"input_ids": input_ids[:, -new:]}
        if input_ids.shape[1]:
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(input_ids)], dim=1)
        beams = len(inputs_embeds) // len(visual_layout)
        return call | {
            "inputs_embeds": inputs_embeds[:, -new:],
            "visual_layout": [spans for spans in visual_layout for _ in range(beams)],
        }


def build_projector(config: LlavaConfig) -> nn.Sequential:
    """The projector named by `mm_projector_type`; ValueError for one LLaVA-1.5 does not know."""
    kind, width = getattr(config, "mm_projector_type", "linear"), config.hidden_size
    if kind == "linear":
        return nn.Sequential(nn.Linear(config.mm_hidden_size, width))
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width))
    raise ValueError(f"mm_projector_type={kind!r}: allowed are 'linear' and 'mlp2x_gelu'")


def positions(mask: Tensor) -> Tensor:
    """Position ids of prompts [B, L] that count real tokens only."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
