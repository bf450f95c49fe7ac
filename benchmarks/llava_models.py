"""LLaVA-1.5 and Video-LLaVA, on transformers 4.37."""

# Each backbone has an environment of its own, so what a builder needs is imported in it.
# ruff: noqa: PLC0415

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import LAYERS, Preparation, Prompt, text_ids
from benchmarks.visual_files import write_clip, write_picture
from benchmarks.words import spelled, word_tokenizer
from strategy.evaluation.ahead import prepare_batches
from strategy.evaluation.pictures import open_picture
from strategy.kernels.transfers import pinned

PICTURE = (640, 480)  # pixels of a picture on disk


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
    """Return CLIP ViT-L/14, or a small one, for pictures with `side` patches along a side."""
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


def create_llava(dtype: torch.dtype, small: bool) -> Any:
    """Create LLaVA-1.5-7B, or a small one."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    import llava  # noqa: F401  registers the backbone
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.vision_tower import CLIPVisionTower

    config, own = _llama_config(small, image_aspect_ratio="pad"), _clip_config(12 if small else 24, small)
    model = LlavaLlamaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation="sdpa")
    size = own.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    clip = CLIPVisionModel._from_config(own, torch_dtype=dtype)
    model.model.vision_tower = CLIPVisionTower(clip, processor, config.mm_vision_select_layer)
    return _templated(model)


def create_video(dtype: torch.dtype, small: bool) -> Any:
    """Create Video-LLaVA-7B, or a small one."""
    import videollava  # noqa: F401  registers the backbone
    from videollava.model import VideoLlavaForCausalLM
    from videollava.model.video_llava import KINDS

    towers = {kind: _clip_config(4 if small else 16, small) for kind in KINDS}
    config = _llama_config(small, towers=towers)
    return _templated(VideoLlavaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation="sdpa"))


def _templated(model: Any) -> Any:
    model.num_template_tokens = 5  # of " ASSISTANT:" with Vicuna's tokeniser
    return model


def llava_prompt(model: Any, dtype: torch.dtype) -> Prompt:
    """Return a prompt with one picture."""
    tower = model.get_vision_tower()
    size, (_, rows, columns) = tower.vision_tower.config.image_size, tower.grid
    return _llama_prompt(model, (35, 1, 40), rows * columns, torch.randn(1, 3, size, size, dtype=dtype))


def video_prompt(model: Any, dtype: torch.dtype) -> Prompt:
    """Return a prompt with one video of 8 frames."""
    tower, frames = model.model.video_tower, 8
    size = tower.config.image_size
    # A class token comes before the patches of each frame.
    pixels = [torch.randn(3, frames, size, size, dtype=dtype)]
    return _llama_prompt(model, (35, frames, 32), frames * (1 + tower.side**2), pixels)


def llava_preparation(model: Any, ids: Sequence[int]) -> Preparation:
    """Return how a prompt comes from a picture, as in the lmms-eval model."""
    from llava.mm_utils import prepare_pictures

    processor = model.get_vision_tower().image_processor

    def picture(file: Path) -> Tensor:
        (prepared,) = prepare_pictures([open_picture(file)], processor, model.config, model.device)
        return prepared

    return _llama_preparation(model, ids, ".jpg", partial(write_picture, size=PICTURE), picture)


def video_preparation(model: Any, ids: Sequence[int]) -> Preparation:
    """Return how a prompt comes from a clip, as in the video script."""
    from videollava.mm_utils import load_video, prepare_video

    side = model.model.video_tower.config.image_size

    def pixels(file: Path) -> Tensor:
        return pinned(prepare_video(load_video(file), side))

    return _llama_preparation(model, ids, ".mp4", write_clip, pixels)


def _llama_preparation(
    model: Any,
    ids: Sequence[int],
    suffix: str,
    write: Callable[..., None],
    pixels: Callable[[Path], Tensor],
) -> Preparation:
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.mm_utils import pad_left, tokenizer_image_token

    tokenizer = word_tokenizer(model.config.vocab_size, {})
    text = spelled(ids, {IMAGE_TOKEN_INDEX: DEFAULT_IMAGE_TOKEN})

    def read(file: Path) -> tuple[Tensor, Tensor]:
        return tokenizer_image_token(text, tokenizer, return_tensors="pt"), pixels(file)

    def joined(prompts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        inputs, mask = pad_left([prompt for prompt, _ in prompts])
        return {"inputs": inputs, "attention_mask": mask, "images": [own for _, own in prompts]}

    def prepare(files: Sequence[Path]) -> dict[str, Any]:
        return joined([*map(read, files)])

    def ahead(batches: Iterable[Sequence[Path]], workers: int) -> Generator[dict[str, Any], None, None]:
        return prepare_batches(read, batches, joined, workers)

    return Preparation(suffix, write, prepare, ahead, tokenizer)


def _llama_prompt(model: Any, lengths: tuple[int, int, int], visual: int, images: Any) -> Prompt:
    """Return a prompt.

    Args:
        model: The model.
        lengths: How many ids stand before the visual tokens, in their place, and behind them.
        visual: How many visual tokens there are.
        images: The pixels.
    """
    from llava.constants import IMAGE_TOKEN_INDEX

    before, places, after = lengths
    config = model.config
    first = [config.bos_token_id, *text_ids(before - 1, config.vocab_size)]
    ids = [*first, *[IMAGE_TOKEN_INDEX] * places, *text_ids(after, config.vocab_size)]
    return Prompt(ids, {"images": images}, visual, before + visual + after)
