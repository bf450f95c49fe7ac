"""Tiny random models of the families of image/Current, and prompts for them."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import qwen_checks
import torch
from qwen_checks import DEEPSTACK_VISION, END, IMAGE, START, TEXT, TOKENS, VIDEO, VISION, Prompts
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import current_vlm  # noqa: F401  registers the backbones

HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 3
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
}


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope | more}


@dataclass(frozen=True, eq=False)
class Family:
    """A family as these tests use it.

    kind, config: the classes of the model and its configuration. text, vision, more: the parts of the tiny model's
    configuration. make: makes prompts of such parts as `prompts` has by name, for each prompt of a batch. budget: of
    each of its stages. sdpa: whether transformers has it for the decoder; if not, "sdpa" is the tower's only.
    answer_type: the type of the tokens that follow a prompt, where tokens have types.
    """

    kind: type
    config: type
    text: Any
    vision: Any
    make: Callable[[list[list[Any]]], Prompts]
    prompts: dict[str, list[list[Any]]]
    more: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=lambda: {"retain_ratio": [0.6, 0.4, 0.2]})
    stages: list[int] = field(default_factory=lambda: [1, 4, 8])
    sdpa: bool = True
    answer_type: int = 0

    @functools.cache  # noqa: B019  there are few, and they live as long as the tests
    def model(self, attention: str = "sdpa") -> Any:
        """The model, the same weights at each call, in float32."""
        torch.manual_seed(0)
        parts = copy.deepcopy({"text_config": self.text, "vision_config": self.vision})
        config = self.config(**parts, **self.more)
        kinds = attention if self.sdpa else {"": attention, "text_config": "eager", "vision_config": attention}
        model = self.kind._from_config(config, attn_implementation=kinds).eval()
        for parameter in model.parameters():
            # A new Gemma 3 projects each picture to zeros, and all norms and biases are alike.
            if parameter.numel() > 1 and parameter.std() == 0:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        return model

    def decoder(self, model: Any) -> Any:
        """The decoder of a model."""
        return model.model.language_model

    @property
    def attending(self) -> list[int]:
        """The layers that have keys."""
        return [at for at, layer in enumerate(self.decoder(self.model()).layers) if hasattr(layer, "self_attn")]

    def longer(self, prompts: Prompts, later: Tensor) -> dict[str, Any]:
        """The arguments of a forward call of prompts and the text tokens [B, R] that follow them."""
        call = dict(prompts.call)
        call["input_ids"] = torch.cat([call["input_ids"], later], dim=1)
        call["attention_mask"] = torch.cat([call["attention_mask"], torch.ones_like(later)], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in call:
                call[name] = torch.cat([call[name], torch.full_like(later, self.answer_type)], dim=1)
        if "mm_token_type_ids" not in call:
            # Only `generate` counts positions without the padding.
            call["position_ids"] = (call["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return call

    def of(self, name: str) -> Prompts:
        """The prompts of that name."""
        return self.make(self.prompts[name])


def qwen(stamp: int) -> Callable[[list[list[Any]]], Prompts]:
    """Return what makes prompts as the processors of the Qwens make them."""

    def make(parts: list[list[Any]]) -> Prompts:
        prompts = qwen_checks.make(parts, stamp)
        ids = prompts.call["input_ids"]
        prompts.call["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return prompts

    return make


def batch(rows: list[list[int]], visual: list[list[int]], grids: list[Any], call: dict[str, Any]) -> Prompts:
    """Pad rows of token ids on the left."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    call |= {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]),
    }
    places = [torch.tensor(own).long() + pad for own, pad in zip(visual, pads, strict=True)]
    return Prompts(call, places, grids)


def tiled(side: int, pixels: int) -> Callable[[list[list[Any]]], Prompts]:
    """Return what makes prompts of text, so many tokens a part, and pictures of [so many] tiles of side x side."""

    def make(parts: list[list[Any]]) -> Prompts:
        generator = torch.Generator().manual_seed(0)
        rows, visual, grids, count = [], [], [], 0
        for sample in parts:
            row, places, own = [], [], []
            for part in sample:
                if isinstance(part, int):
                    row += torch.randint(1, 60, (part,), generator=generator).tolist()
                    continue
                size = part[0] * side * side
                places += range(len(row) + 1, len(row) + 1 + size)
                row += [START, *[IMAGE] * size, END]
                own += [(1, side, side)] * part[0]
                count += part[0]
            rows.append(row)
            visual.append(places)
            grids.append(own)
        call = {"pixel_values": torch.randn(count, 3, pixels, pixels, generator=generator)} if count else {}
        return batch(rows, visual, grids, call)

    return make


def typed(make: Callable[[list[list[Any]]], Prompts]) -> Callable[[list[list[Any]]], Prompts]:
    """Return what makes such prompts with the types of their tokens."""

    def typed_make(parts: list[list[Any]]) -> Prompts:
        prompts = make(parts)
        prompts.call["token_type_ids"] = (prompts.call["input_ids"] == IMAGE).long()
        return prompts

    return typed_make


def prefixed(make: Callable[[list[list[Any]]], Prompts]) -> Callable[[list[list[Any]]], Prompts]:
    """Return what makes such prompts as prefixes, whose tokens see each other both ways, padding and all."""

    def prefixed_make(parts: list[list[Any]]) -> Prompts:
        prompts = make(parts)
        prompts.call["token_type_ids"] = torch.zeros_like(prompts.call["input_ids"])
        return prompts

    return prefixed_make


def packed(model: Any, sizes: list[tuple[int, int]], alone: list[bool]) -> list[Tensor]:
    """Which tokens of each picture of such sizes are new lines, as a LLaVA of tiles itself packs its features.

    alone: whether each picture is the only one of its prompt.
    """
    config, inner = model.config, model.model
    side, width = config.vision_config.image_size // config.vision_config.patch_size, config.text_config.hidden_size
    features = [
        torch.zeros(
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if single or not hasattr(config, "vision_aspect_ratio")
            else 1,
            side * side,
            width,
        )
        for size, single in zip(sizes, alone, strict=True)
    ]
    more = (
        {"vision_aspect_ratio": config.vision_aspect_ratio}
        if hasattr(config, "vision_aspect_ratio")
        else {"vision_feature_select_strategy": "default"}
    )
    packs, _ = inner.pack_image_features(features, torch.tensor(sizes), image_newline=torch.ones(width), **more)
    return [pack[:, 0] == 1 for pack in packs]


def anyres(name: str) -> Callable[[list[list[Any]]], Prompts]:
    """Return what makes prompts of text, pictures (rows, columns) of pixels, and videos of [so many] frames."""

    def make(parts: list[list[Any]]) -> Prompts:
        model, generator = FAMILIES[name].model(), torch.Generator().manual_seed(0)
        config, pixels = model.config, model.config.vision_config.image_size
        half = -(-pixels // config.vision_config.patch_size // 2)
        several = hasattr(config, "vision_aspect_ratio")
        pictures = [[part for part in sample if isinstance(part, tuple)] for sample in parts]
        sizes = [size for own in pictures for size in own]
        newlines = iter(packed(model, sizes, [len(own) == 1 for own in pictures for _ in own]))
        rows, visual, frames = [], [], []
        for sample, own in zip(parts, pictures, strict=True):
            row, places = [], []
            for part in sample:
                if isinstance(part, int):
                    row += torch.randint(1, 60, (part,), generator=generator).tolist()
                    continue
                if isinstance(part, list):
                    frames += part
                    size, last = part[0] * half * half + 1, 1
                else:
                    size, last = len(next(newlines)), int(several and len(own) > 1)
                row.append(START)
                places += range(len(row), len(row) + size - last)
                row += [*[VIDEO if isinstance(part, list) else IMAGE] * size, END]
            rows.append(row)
            visual.append(places)
        call: dict[str, Any] = {}
        if sizes:
            call |= {"pixel_values": torch.randn(len(sizes), 6, 3, pixels, pixels, generator=generator)}
            call["image_sizes"] = torch.tensor(sizes)
        if sizes and several:
            call["batch_num_images"] = torch.tensor([len(own) for own in pictures if own])
        if frames:
            call["pixel_values_videos"] = torch.randn(len(frames), frames[0], 3, pixels, pixels, generator=generator)
        return batch(rows, visual, [], call)

    return make


QWEN_PROMPTS = {
    "one": [[12, (4, 6), 9]],
    "several": [[3, (3, 5), 2, (2, 4, 3), 3, (4, 4), 6]],
    "batch": [[20, (4, 6), 9], [3, (5, 7), 6], [50]],
}
TILE_PROMPTS = {
    "one": [[12, [1], 9]],
    "several": [[3, [1], 6, [1], 7]],
    "batch": [[20, [1], 9], [3, [1], 5, [1], 6], [50]],
}
QWEN35_VISION = VISION | {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
ANYRES_PROMPTS = {
    "one": [[12, (30, 50), 9]],
    "several": [[3, (20, 61), 6, (24, 24), 7]],
    "batch": [[20, (40, 30), 9], [3, (20, 61), 5, (31, 30), 6], [50]],
}
INTERN = {"image_token_id": IMAGE, "downsample_ratio": 0.5, "image_seq_length": 16}
INTERN_VISION = InternVLVisionConfig(**TOWER, image_size=[32, 32], use_absolute_position_embeddings=True)
INTERN_PROMPTS = {
    "one": [[12, [4], 9]],
    "several": [[3, [3], 6, [1], 7]],
    "batch": [[20, [1], 9], [3, [4], 5, [2], 6], [50]],
}
PALI = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}

FAMILIES = {
    "qwen2_5_vl": Family(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        TEXT | mrope(2, 3, 3),
        VISION
        | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 16}
        | {"fullatt_block_indexes": [1]},
        qwen(0),
        QWEN_PROMPTS,
        TOKENS,
    ),
    "qwen2_vl": Family(
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        TEXT | mrope(2, 3, 3),
        VISION | {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        qwen(0),
        QWEN_PROMPTS,
        TOKENS,
    ),
    "qwen3_vl": Family(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        TEXT | HEADS | mrope(2, 3, 3),
        DEEPSTACK_VISION,
        qwen(3),
        QWEN_PROMPTS,
        TOKENS,
    ),
    "qwen3_vl_moe": Family(
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLMoeConfig,
        TEXT | HEADS | mrope(2, 3, 3) | EXPERTS,
        DEEPSTACK_VISION,
        qwen(3),
        QWEN_PROMPTS,
        TOKENS,
    ),
    "llava_hf": Family(
        LlavaForConditionalGeneration,
        LlavaConfig,
        LlamaConfig(**TEXT),
        CLIPVisionConfig(**TOWER, image_size=24),
        tiled(6, 24),
        TILE_PROMPTS,
        {"image_token_id": IMAGE, "vision_feature_layer": -1},
        {"keep_tokens": [20, 12, 5]},
    ),
    "gemma3": Family(
        Gemma3ForConditionalGeneration,
        Gemma3Config,
        TEXT | HEADS | {"sliding_window": 256, "query_pre_attn_scalar": 16} | {"layer_types": SLIDING},
        SiglipVisionConfig(**TOWER, image_size=48, vision_use_head=False),
        typed(tiled(6, 48)),
        TILE_PROMPTS,
        {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 36},
    ),
    "paligemma": Family(
        PaliGemmaForConditionalGeneration,
        PaliGemmaConfig,
        GemmaConfig(**TEXT | HEADS),
        SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        prefixed(tiled(6, 24)),
        TILE_PROMPTS,
        PALI,
        answer_type=1,
    ),
    "paligemma2": Family(
        PaliGemmaForConditionalGeneration,
        PaliGemmaConfig,
        Gemma2Config(
            **TEXT | HEADS,
            sliding_window=256,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
        SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        prefixed(tiled(6, 24)),
        TILE_PROMPTS,
        PALI,
        sdpa=False,
        answer_type=1,
    ),
    "qwen3_5": Family(
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Config,
        TEXT | HEADS | LINEAR | mrope(1, 1, 2, partial_rotary_factor=0.5),
        QWEN35_VISION,
        qwen(3),
        QWEN_PROMPTS,
        TOKENS,
        {"retain_ratio": [0.6, 0.3]},
        [4, 8],
    ),
    "qwen3_5_moe": Family(
        Qwen3_5MoeForConditionalGeneration,
        Qwen3_5MoeConfig,
        TEXT
        | HEADS
        | LINEAR
        | EXPERTS
        | mrope(1, 1, 2, partial_rotary_factor=0.5)
        | {"shared_expert_intermediate_size": 32},
        QWEN35_VISION,
        qwen(3),
        QWEN_PROMPTS,
        TOKENS,
        {"retain_ratio": [0.6, 0.3]},
        [4, 8],
    ),
    "llava_next": Family(
        LlavaNextForConditionalGeneration,
        LlavaNextConfig,
        LlamaConfig(**TEXT),
        CLIPVisionConfig(**TOWER, image_size=24),
        anyres("llava_next"),
        ANYRES_PROMPTS,
        {"image_token_id": IMAGE, "vision_feature_layer": -1, "image_grid_pinpoints": PINPOINTS},
    ),
    "llava_onevision": Family(
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig,
        Qwen2Config(**TEXT),
        SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        anyres("llava_onevision"),
        ANYRES_PROMPTS | {"several": [[3, (30, 30), 6, [3], 7]]},
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_grid_pinpoints": PINPOINTS}
        | {"vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_2"},
    ),
    "internvl3": Family(
        InternVLForConditionalGeneration,
        InternVLConfig,
        Qwen2Config(**TEXT),
        INTERN_VISION,
        tiled(4, 32),
        INTERN_PROMPTS,
        INTERN,
    ),
    "internvl3_5": Family(
        InternVLForConditionalGeneration,
        InternVLConfig,
        Qwen3Config(**TEXT | HEADS),
        INTERN_VISION,
        tiled(4, 32),
        INTERN_PROMPTS,
        INTERN,
    ),
}
