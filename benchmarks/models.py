"""Models of real size with random weights, and a prompt for each; nothing is downloaded."""

# Each backbone has an environment of its own, so what a builder needs is imported in it.
# ruff: noqa: PLC0415

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn

LAYERS = 12  # of a small decoder: as many as the strategies' default stages need
SPREAD = 0.02  # standard deviation of the weights, at which activations stay far below float16's largest number


class Case(NamedTuple):
    """A model and one prompt for it.

    model: the whole model on its device, in evaluation mode. inputs: keyword arguments of `model.generate`.
    visual: visual tokens of the prompt; tokens: all of its tokens, the visual ones included. prune: fields of
    `strategy.VTRConfig` that this model needs beyond those that are asked for.
    """

    model: Any
    inputs: dict[str, Any]
    visual: int
    tokens: int
    prune: dict[str, Any]


class _Prompt(NamedTuple):
    """Token ids, the arguments that hold pixels or tell of them, and what `Case` says of the prompt."""

    ids: list[int]
    visuals: dict[str, Any]
    visual: int
    tokens: int


class _Family(NamedTuple):
    """How a backbone's model and prompt are made on torch's default device.

    create: of a dtype and whether it shall be small. prompt: of a model and the dtype of its pixels. argument: of
    `generate`, for the token ids.
    """

    create: Callable[[torch.dtype, bool], Any]
    prompt: Callable[[Any, torch.dtype], _Prompt]
    argument: str


def build(backbone: str, device: str, dtype: torch.dtype, small: bool = False, to_split: bool = False) -> Case:
    """A backbone's model with seeded weights, and a prompt with one picture or video.

    backbone: one of BACKBONES, whose package the environment must have. small: a model of one or two
    million weights, for a CPU. to_split: see `_to_split`. On the device "meta" everything has its shape and no memory.
    An answer never ends of itself. Raises ValueError for another backbone.
    """
    if backbone not in _FAMILIES:
        raise ValueError(f"backbone={backbone!r}: allowed are {', '.join(BACKBONES)}")
    family, place = _FAMILIES[backbone], torch.device(device)
    with _seeded(place, 0), place, torch.no_grad():
        model = (_to_split(family.create, dtype, small) if to_split else _fill(family.create(dtype, small))).eval()
        prompt = family.prompt(model, dtype)
        ids = torch.tensor([prompt.ids])
        inputs = {family.argument: ids, "attention_mask": torch.ones_like(ids)} | prompt.visuals
    return Case(model, inputs, prompt.visual, prompt.tokens, {})


def batched(case: Case, batch: int) -> dict[str, Any]:
    """The inputs for so many copies of a case's prompt, each but the first with random pixels of its own."""

    def several(value: Any) -> Any:
        if isinstance(value, list):
            return value + [torch.randn_like(one) for _ in range(batch - 1) for one in value]
        if value.is_floating_point():
            return torch.cat([value, *(torch.randn_like(value) for _ in range(batch - 1))])
        return value.repeat(batch, 1)

    with _seeded(case.model.device, 1):
        return {name: several(value) for name, value in case.inputs.items()}


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _to_split(create: Callable[[torch.dtype, bool], Any], dtype: torch.dtype, small: bool) -> Any:
    """A model whose decoder's layers lie on the CPU and have the first one's numbers, all in the same memory.

    So a decoder that is larger than any memory can be split over several GPUs.
    """
    with init_empty_weights(include_buffers=False):
        model = create(dtype, small)
    first, *others = model.get_decoder().layers
    empty = {part for layer in others for part in layer.modules()}
    for part in set(model.modules()) - empty:
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
    _fill(model)  # does nothing to what has no memory
    first.to("cpu")
    for layer in others:
        for name, part in layer.named_modules():
            for kind, parameter in first.get_submodule(name).named_parameters(recurse=False):
                setattr(part, kind, nn.Parameter(parameter.data, requires_grad=False))
    return model


def _fill(model: Any) -> Any:
    """Give every parameter its value; the row of the token that ends an answer is zero, which never is the largest."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("weight") and parameter.dim() == 1:  # a norm's
            parameter.fill_(1)
        else:
            parameter.normal_(std=SPREAD)
    model.get_output_embeddings().weight[model.generation_config.eos_token_id].zero_()
    return model


def _words(count: int, end: int) -> list[int]:
    """Ids of so many tokens of text, below those of all special tokens from `end` on and above those of Llama's."""
    draw = random.Random(count)
    return [draw.randrange(3, end) for _ in range(count)]


# LLaVA-1.5 and Video-LLaVA, on transformers 4.37.


def _llama_config(small: bool, **fields: Any) -> Any:
    from llava.model import LlavaConfig

    size = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 1024,
    }
    if small:
        size = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "max_position_embeddings": 1024,
            "mm_hidden_size": 64,
        }
    return LlavaConfig(
        **size,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        **fields,
    )


def _clip_config(side: int, small: bool) -> Any:
    """CLIP ViT-L/14, or a small one, for pictures with so many patches along a side."""
    from transformers import CLIPVisionConfig

    width, layers, patch = (64, 4, 4) if small else (1024, 24, 14)
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2 if small else 16,
        image_size=side * patch,
        patch_size=patch,
    )


def _llava(dtype: torch.dtype, small: bool) -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    import llava  # noqa: F401  registers the backbone
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.vision_tower import CLIPVisionTower

    config, own = _llama_config(small), _clip_config(12 if small else 24, small)
    model = LlavaLlamaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation="sdpa")
    size = own.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    clip = CLIPVisionModel._from_config(own, torch_dtype=dtype)
    model.model.vision_tower = CLIPVisionTower(clip, processor, config.mm_vision_select_layer)
    return _templated(model)


def _video(dtype: torch.dtype, small: bool) -> Any:
    import videollava  # noqa: F401  registers the backbone
    from videollava.model import VideoLlavaForCausalLM
    from videollava.model.video_llava import KINDS

    towers = {kind: _clip_config(4 if small else 16, small) for kind in KINDS}
    config = _llama_config(small, towers=towers)
    return _templated(VideoLlavaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation="sdpa"))


def _templated(model: Any) -> Any:
    model.num_template_tokens = 5  # of " ASSISTANT:" with Vicuna's tokeniser
    return model


def _llava_prompt(model: Any, dtype: torch.dtype) -> _Prompt:
    tower = model.get_vision_tower()
    size, (_, rows, columns) = tower.vision_tower.config.image_size, tower.grid
    return _llama_prompt(model, (35, 1, 40), rows * columns, torch.randn(1, 3, size, size, dtype=dtype))


def _video_prompt(model: Any, dtype: torch.dtype) -> _Prompt:
    tower, frames = model.model.video_tower, 8
    size = tower.config.image_size
    # A class token comes before the patches of each frame.
    pixels = [torch.randn(3, frames, size, size, dtype=dtype)]
    return _llama_prompt(model, (35, frames, 32), frames * (1 + tower.side**2), pixels)


def _llama_prompt(model: Any, lengths: tuple[int, int, int], visual: int, images: Any) -> _Prompt:
    """lengths: of the text before the visual tokens, of what stands for these in the ids, and of the text behind."""
    from llava.constants import IMAGE_TOKEN_INDEX

    before, places, after = lengths
    config = model.config
    first = [config.bos_token_id, *_words(before - 1, config.vocab_size)]
    ids = [*first, *[IMAGE_TOKEN_INDEX] * places, *_words(after, config.vocab_size)]
    return _Prompt(ids, {"images": images}, visual, before + visual + after)


# The Qwens, on transformers 4.57 and 5.2.


def _qwen_ids(small: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Special tokens that the text's configuration names, and those that the whole one names."""
    first = 300 if small else 151643
    text = {"bos_token_id": first, "pad_token_id": first, "eos_token_id": first + 2}
    whole = {"vision_start_token_id": 9, "vision_end_token_id": 10, "image_token_id": 12, "video_token_id": 13}
    return text, {name: first + further for name, further in whole.items()}


def _qwen(kind: Any, config: Any, dtype: torch.dtype, small: bool, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    own, whole = _qwen_ids(small)
    made = config(text_config=text | {"rms_norm_eps": 1e-6} | own, vision_config=vision, **whole)
    model = kind._from_config(made, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.update(**own)
    return model


SMALL_QWEN = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def _qwen2(dtype: torch.dtype, small: bool, large: bool = False) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    import qwen2_vl_vtr  # noqa: F401  registers the backbone

    text: dict[str, Any] = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
    if large:
        text |= {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
        text |= {"num_attention_heads": 64, "num_key_value_heads": 8}
        vision["hidden_size"] = 8192
    if small:
        text = SMALL_QWEN | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
        vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 4}
    return _qwen(Qwen2VLForConditionalGeneration, Qwen2VLConfig, dtype, small, text | {"rope_theta": 1e6}, vision)


def _qwen3(dtype: torch.dtype, small: bool) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    import qwen3_vl_vtr  # noqa: F401  registers the backbone

    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": rotary | {"mrope_section": [24, 20, 20]},
    }
    vision: dict[str, Any] = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
        "num_heads": 16,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    if small:
        text = SMALL_QWEN | {"head_dim": 32, "rope_parameters": rotary | {"mrope_section": [6, 5, 5]}}
        vision = {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2, 3],
        }
    return _qwen(Qwen3VLForConditionalGeneration, Qwen3VLConfig, dtype, small, text, vision)


def _qwen_prompt(model: Any, dtype: torch.dtype) -> _Prompt:
    config, tower = model.config, model.config.vision_config
    small = config.get_text_config().vocab_size == SMALL_QWEN["vocab_size"]
    end, side = model.generation_config.eos_token_id, 24 if small else 72
    visual = (side // tower.spatial_merge_size) ** 2
    text = model.generation_config.pad_token_id
    before = [*_words(14, text), config.vision_start_token_id]
    # As in the chat template, four tokens follow the one that ends the question's turn.
    after = [config.vision_end_token_id, *_words(34, text), end, *_words(4, text)]
    ids = [*before, *[config.image_token_id] * visual, *after]
    width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    visuals = {
        "pixel_values": torch.randn(side * side, width, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }
    return _Prompt(ids, visuals, visual, len(ids))


_FAMILIES = {
    "llava": _Family(_llava, _llava_prompt, "inputs"),
    "video": _Family(_video, _video_prompt, "inputs"),
    "qwen2": _Family(_qwen2, _qwen_prompt, "input_ids"),
    "qwen2-72b": _Family(partial(_qwen2, large=True), _qwen_prompt, "input_ids"),
    "qwen3": _Family(_qwen3, _qwen_prompt, "input_ids"),
}
BACKBONES = tuple(_FAMILIES)
