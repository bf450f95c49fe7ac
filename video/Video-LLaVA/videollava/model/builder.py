"""Loading a checkpoint in Video-LLaVA's original format."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer

from llava.model.builder import (
    check_files,
    check_tower,
    load_tokenizer,
    load_weights,
    num_template_tokens,
    read_config,
    refuse_unsupported,
    tower_config,
)
from llava.model.llava_llama import LlavaConfig
from strategy.distributed.processes import find_device
from strategy.evaluation.checkpoint_files import Shapes, find_folder
from videollava.conversation import conv_llava_v1
from videollava.model.tower import FrameTower, config_from_shapes
from videollava.model.video_llava import KINDS, VideoLlavaForCausalLM

NEEDED = ("mm_image_tower", "mm_video_tower", "mm_hidden_size", "mm_vision_select_layer")


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device: str | torch.device | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[LlamaTokenizer, VideoLlavaForCausalLM, int]:
    """Load a checkpoint.

    Args:
        model_path: A folder, or the id of a repository on the hub.
        model_base: Refused if given; callers of the original loader pass it.
        model_name: Ignored, likewise.
        load_8bit: Refused if set, likewise.
        load_4bit: Refused if set, likewise.
        device: Where the model goes; by default CUDA if there is one, otherwise the CPU.
        cache_dir: Where repositories of the hub are kept.
        dtype: The weights' type; by default float16 on CUDA, otherwise float32.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".

    Returns:
        Tokenizer, model and context length.

    Raises:
        ValueError: Something is missing, damaged, or not Video-LLaVA; one sentence names the file or the argument.
    """
    refuse_unsupported(model_base, load_8bit or load_4bit, attn_implementation)
    place = find_device(device)
    dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
    folder = find_folder(model_path, cache_dir)
    config = read_config(folder, NEEDED)
    shapes = check_files(folder, "tokenizer.model")
    refuse_temporal(folder, shapes)
    config.towers = {kind: inside_config(folder, config, kind, shapes) for kind in KINDS}
    model = load_weights(VideoLlavaForCausalLM, folder, config, dtype, None, attn_implementation)
    for kind in KINDS:
        if config.towers[kind] is None:
            setattr(model.model, f"{kind}_tower", load_tower(folder, config, kind, cache_dir).to(dtype))
    context = int(getattr(config, "tokenizer_model_max_length", None) or config.max_position_embeddings)
    tokenizer = load_tokenizer(folder)
    model.num_template_tokens = num_template_tokens(tokenizer, conv_llava_v1)
    return tokenizer, model.to(place).eval(), context


def weight_folders(model_path: str, cache_dir: str | None = None) -> Iterator[Path]:
    """Yield the folders that a checkpoint's weights lie in: its own, and those of towers that are elsewhere."""
    folder = find_folder(model_path, cache_dir)
    yield folder
    config, shapes = read_config(folder, NEEDED), check_files(folder)
    for kind in KINDS:
        if not _is_inside(kind, shapes):
            yield find_tower(folder, config, kind, cache_dir)


def find_tower(folder: Path, config: LlavaConfig, kind: str, cache_dir: str | None) -> Path:
    """Return the folder of the tower that the configuration names: in the checkpoint, anywhere, or a hub id's."""
    name = getattr(config, f"mm_{kind}_tower")
    return folder / name if (folder / name).is_dir() else find_folder(name, cache_dir)


def _prefix(kind: str) -> str:
    """Return what the names of a tower's weights begin with where they are in the checkpoint."""
    return f"model.{kind}_tower.{kind}_tower."


def _is_inside(kind: str, shapes: Iterable[str]) -> bool:
    return any(name.startswith(_prefix(kind)) for name in shapes)


def inside_config(folder: Path, config: LlavaConfig, kind: str, shapes: Shapes) -> CLIPVisionConfig | None:
    """Return the configuration of a tower whose weights are in the checkpoint; None if they are elsewhere."""
    if not _is_inside(kind, shapes):
        return None
    beside = folder / getattr(config, f"mm_{kind}_tower")
    return tower_config(beside) if beside.is_dir() else config_from_shapes(shapes, _prefix(kind))


def load_tower(folder: Path, config: LlavaConfig, kind: str, cache_dir: str | None) -> FrameTower:
    """Load the tower that the configuration names, see `find_tower`."""
    place = find_tower(folder, config, kind, cache_dir)
    shapes = check_files(place, "config.json")
    refuse_temporal(place, shapes)
    own = check_tower(place, shapes)
    try:
        clip = CLIPVisionModel.from_pretrained(place, config=own)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{place}: the {kind} tower cannot be loaded: {error}") from error
    tower = FrameTower(kind, own, config.mm_vision_select_layer)
    tower.add_module(f"{kind}_tower", clip.vision_model)
    return tower.requires_grad_(False)


def refuse_temporal(folder: Path, shapes: Shapes) -> None:
    """Raise ValueError for a tower whose frames attend to each other."""
    if any("temporal" in name for name in shapes):
        raise ValueError(
            f"{folder}: its video tower has temporal attention, which is not supported: frames are seen alone"
        )
