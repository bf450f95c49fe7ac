"""Qwen2-VL and Qwen3-VL, on transformers 4.57 and 5.2."""

# Each backbone has an environment of its own, so what a builder needs is imported in it.
# ruff: noqa: PLC0415

from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import LAYERS, Preparation, Prompt, text_ids
from benchmarks.visual_files import write_picture
from benchmarks.words import spelled, word_tokenizer
from strategy.evaluation.ahead import prepare_ahead
from strategy.evaluation.pictures import open_picture, to_rgb

CELLS = (4, 16384)  # visual tokens of the smallest and of the largest picture that is not resized
FRAME, SMALL_FRAME = (8, 16), (2, 4)  # visual tokens of two frames of a video, by rows and columns
TIME_TOKENS = 6  # of a time such as <12.5 seconds>

SMALL_QWEN = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def _qwen_ids(small: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return the special tokens of the text's configuration, and those of the model's."""
    first = 300 if small else 151643
    text = {"bos_token_id": first, "pad_token_id": first, "eos_token_id": first + 2}
    whole = {"vision_start_token_id": 9, "vision_end_token_id": 10, "image_token_id": 12, "video_token_id": 13}
    return text, {name: first + further for name, further in whole.items()}


def _qwen(kind: Any, config: Any, dtype: torch.dtype, small: bool, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    own, whole = _qwen_ids(small)
    whole_config = config(text_config=text | {"rms_norm_eps": 1e-6} | own, vision_config=vision, **whole)
    model = kind._from_config(whole_config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.update(**own)
    return model


def create_qwen2(dtype: torch.dtype, small: bool, large: bool = False) -> Any:
    """Create Qwen2-VL-7B, a small one, or the 72B one."""
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


def create_qwen3(dtype: torch.dtype, small: bool) -> Any:
    """Create Qwen3-VL-8B, or a small one."""
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


def _patches(model: Any) -> int:
    """Return how many patches there are along a side of the picture."""
    return 24 if _is_small(model) else 72


def _is_small(model: Any) -> bool:
    size: int = model.config.get_text_config().vocab_size
    return size == SMALL_QWEN["vocab_size"]


def qwen_preparation(model: Any, ids: Sequence[int]) -> Preparation:
    """Return how a prompt comes from a picture, by the family's fast processor, as in evaluation."""
    import transformers

    from qwen_vl_vtr.colours import keep_bytes

    config, tower = model.config, model.config.vision_config
    family = {"qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL"}[config.model_type]
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    own = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    marks = {f"<|{name}|>": number for name, number in zip(names, own, strict=True)}
    tokenizer = word_tokenizer(config.get_text_config().vocab_size, marks, transformers.Qwen2TokenizerFast)
    cell = (tower.patch_size * tower.spatial_merge_size) ** 2
    shape = {
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "merge_size": tower.spatial_merge_size,
        "size": dict(zip(("shortest_edge", "longest_edge"), (cells * cell for cells in CELLS), strict=True)),
    }
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessorFast(**shape),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{family}VideoProcessor")(),
    )
    # The processor writes a mark for each visual token in place of one.
    once = [ids[0], *(later for former, later in pairwise(ids) if (former, later) != (config.image_token_id,) * 2)]
    text = spelled(once, {number: mark for mark, number in marks.items()})

    keep_bytes(processor)

    def prepare(files: Sequence[Path]) -> Any:
        pictures = [to_rgb(open_picture(file)) for file in files]
        return processor(text=[text] * len(files), images=pictures, padding=True, return_tensors="pt")

    side = _patches(model) * tower.patch_size
    write = partial(write_picture, size=(side, side))
    return Preparation(".jpg", write, prepare, partial(prepare_ahead, prepare), tokenizer)


def qwen_prompt(model: Any, dtype: torch.dtype) -> Prompt:
    """Return a prompt with one picture."""
    return qwen_picture_prompt(model, dtype, (_patches(model) // model.config.vision_config.spatial_merge_size) ** 2)


def qwen_picture_prompt(model: Any, dtype: torch.dtype, visual: int) -> Prompt:
    """Return a prompt with one square picture of so many visual tokens.

    Raises:
        ValueError: There is no such picture.
    """
    side = isqrt(visual)
    if side < 2 or side**2 != visual:
        raise ValueError(f"visual={visual}: want the tokens of a square picture, such as 256, 576 or 1024")
    config = model.config
    places = [config.vision_start_token_id, *[config.image_token_id] * visual, config.vision_end_token_id]
    return _qwen_prompt(model, dtype, places, (1, side, side), ("pixel_values", "image_grid_thw"))


def qwen_video_prompt(model: Any, dtype: torch.dtype, frames: int) -> Prompt:
    """Return a prompt with one video of so many frames, of which the tower makes one of two.

    Raises:
        ValueError: The frames do not fill the tower's.
    """
    config, together = model.config, model.config.vision_config.temporal_patch_size
    if frames < together or frames % together:
        raise ValueError(f"frames={frames}: want a multiple of {together}")
    times, (rows, columns) = frames // together, SMALL_FRAME if _is_small(model) else FRAME
    frame = [config.video_token_id] * (rows * columns)
    # Qwen3-VL has the time before each frame, and marks around it.
    apart = config.model_type == "qwen3_vl"
    parts = [frame] * times if apart else [frame * times]
    stamp = text_ids(TIME_TOKENS if apart else 0, model.generation_config.pad_token_id)
    marked = [[*stamp, config.vision_start_token_id, *each, config.vision_end_token_id] for each in parts]
    grid = (times, rows, columns)
    return _qwen_prompt(model, dtype, [*chain(*marked)], grid, ("pixel_values_videos", "video_grid_thw"))


def _qwen_prompt(
    model: Any, dtype: torch.dtype, places: list[int], grid: tuple[int, int, int], names: tuple[str, str]
) -> Prompt:
    """Return a prompt.

    Args:
        model: The model.
        dtype: That of the pixels.
        places: The ids in whose place the visual tokens stand, with the marks around them.
        grid: Of the visual tokens (T, H, W).
        names: The arguments for pixels and for the grid of patches.
    """
    tower, (times, rows, columns) = model.config.vision_config, grid
    end, text = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    # As in the chat template, four tokens follow the one that ends the question's turn.
    ids = [*text_ids(14, text), *places, *text_ids(34, text), end, *text_ids(4, text)]
    patches = [times, *(side * tower.spatial_merge_size for side in (rows, columns))]
    width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    visuals = {names[0]: torch.randn(prod(patches), width, dtype=dtype), names[1]: torch.tensor([patches])}
    return Prompt(ids, visuals, prod(grid), len(ids))
