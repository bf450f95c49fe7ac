"""Tiny random checkpoints of the families of image/Current, with processors, as lmms-eval's wrappers load them."""

import copy
from pathlib import Path
from typing import Any

import torch
from current_models import FAMILIES, PINPOINTS
from lmms_checks import CHECKPOINTS
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SHAPES = CHECKPOINTS / "shapes-qwen3"
TEMPLATE = (SHAPES / "chat_template.jinja").read_text()
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"


def parts(name: str, tokenizer: Any, template: str) -> Any:  # noqa: PLR0911  one a family
    """The processor of a family."""
    square, more = {"height": 24, "width": 24}, {"tokenizer": tokenizer, "chat_template": template}
    if name == "llava_hf":
        images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=square)
        return LlavaProcessor(
            images, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **more
        )
    if name == "llava_next":
        images = LlavaNextImageProcessor(size={"shortest_edge": 24}, crop_size=square, image_grid_pinpoints=PINPOINTS)
        return LlavaNextProcessor(
            images, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1, **more
        )
    if name == "llava_onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
            video_processor=LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=36,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            **more,
        )
    if name == "internvl3":
        images, size = GotOcr2ImageProcessor(size={"height": 32, "width": 32}), {"height": 32, "width": 32}
        return InternVLProcessor(images, video_processor=InternVLVideoProcessor(size=size), image_seq_length=16, **more)
    if name == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessor(size={"height": 48, "width": 48}), image_seq_length=36, **more)
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    if name == "qwen2_5_vl":
        images, videos = Qwen2VLImageProcessor(**patches), Qwen2VLVideoProcessor(**patches)
        return Qwen2_5_VLProcessor(images, video_processor=videos, **more)
    images, videos = Qwen2VLImageProcessor(**patches), Qwen3VLVideoProcessor(**patches)
    return Qwen3VLProcessor(images, video_processor=videos, **more)


# The tokens of families other than Qwen: their names as attributes of the tokenizer.
MARKS = {
    "llava_hf": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl3": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
}


def save(name: str, folder: Path) -> None:
    """Save a tiny random checkpoint of a family."""
    family, marks = FAMILIES[name], MARKS.get(name, {})
    tokenizer = AutoTokenizer.from_pretrained(SHAPES, extra_special_tokens=marks) if marks else None
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(SHAPES)
    mark = next((marks[key] for key in ("boi_token", "context_image_token", "image_token") if key in marks), QWEN_MARK)
    template = TEMPLATE.replace(QWEN_MARK, mark)
    tokenizer.chat_template = template
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in marks.items()}
    more = family.more | {
        "image_token_id": ids.get("context_image_token", ids.get("image_token", 361)),
        "video_token_id": ids.get("video_token", 362),
        "vision_start_token_id": 359,
        "vision_end_token_id": 360,
    }
    if name == "gemma3":
        more = {"image_token_index": ids["image_token"], "boi_token_index": ids["boi_token"]}
        more |= {"eoi_token_index": ids["eoi_token"], "mm_tokens_per_image": 36}
    text = copy.deepcopy(family.text)
    text = text if isinstance(text, dict) else text.to_dict()
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "eos_token_id": 356, "pad_token_id": 357}
    text |= {"sliding_window": 1024} if name == "gemma3" else {}
    torch.manual_seed(0)
    config = family.config(text_config=text, vision_config=copy.deepcopy(family.vision), **more)
    # The wrappers load it so, and other weights would be rounded.
    model = family.kind._from_config(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 356, 357
    model.save_pretrained(folder)
    parts(name, tokenizer, template).save_pretrained(folder)
