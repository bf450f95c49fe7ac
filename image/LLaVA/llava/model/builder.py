"""Loading a checkpoint in LLaVA-1.5's original format."""

from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer, PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from llava.conversation import Conversation, conv_vicuna_v1
from llava.model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.vision_tower import CLIPVisionTower
from strategy.distributed.processes import find_device
from strategy.evaluation.checkpoint_files import (
    Shapes,
    find_folder,
    misfit,
    read_json,
    read_settings,
    weight_files,
    weight_shapes,
)

ATTENTION = ("sdpa", "eager", "flash_attention_2")
NEEDED = ("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer")
MAX_POSITIONS = 1 << 20  # the decoder keeps a rotation for each of them
# Buffers that older checkpoints hold although every model computes them itself.
DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, int | str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[LlamaTokenizer, LlavaLlamaForCausalLM, CLIPImageProcessor, int]:
    """Load a checkpoint.

    Args:
        model_path: A folder, or the id of a repository on the hub.
        model_base: Refused if given; callers of the original loader pass it.
        model_name: Ignored, likewise.
        load_8bit: Refused if set, likewise.
        load_4bit: Refused if set, likewise.
        device_map: As accelerate takes it, in place of `device`.
        device: Where the model goes; by default CUDA if there is one, otherwise the CPU.
        dtype: The weights' type; by default float16 on CUDA, otherwise float32.
        attn_implementation: One of ATTENTION.

    Returns:
        Tokenizer, model, image processor and context length.

    Raises:
        ValueError: Something is missing, damaged, or not LLaVA-1.5; one sentence names the file or the argument.
    """
    refuse_unsupported(model_base, load_8bit or load_4bit, attn_implementation)
    place = find_device(device)
    dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
    folder = find_folder(model_path)
    config = read_config(folder)
    model = load_weights(LlavaLlamaForCausalLM, folder, config, dtype, device_map, attn_implementation)
    model.model.vision_tower = load_tower(folder, config, dtype)
    if device_map is None:
        model.to(place)
    else:
        model.model.vision_tower.to(model.device)
    context = int(getattr(config, "max_sequence_length", 2048))
    tokenizer = load_tokenizer(folder)
    model.tokenizer, model.num_template_tokens = tokenizer, num_template_tokens(tokenizer)
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, context


def weight_folders(model_path: str) -> Iterator[Path]:
    """Yield the folders that a checkpoint's weights lie in: its own, and its vision tower's."""
    folder = find_folder(model_path)
    yield folder
    yield find_tower(folder, read_config(folder))


def find_tower(folder: Path, config: LlavaConfig) -> Path:
    """Return the folder of the vision tower that a configuration names: in the checkpoint, anywhere, or a hub id's."""
    inside = folder / config.mm_vision_tower
    return inside if inside.is_dir() else find_folder(config.mm_vision_tower)


def num_template_tokens(tokenizer: Any, template: Conversation = conv_vicuna_v1) -> int:
    """Return how many tokens of a template follow the question in every prompt."""
    prompts = []
    for question in ("Why?", "Count them"):
        conversation = template.copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        prompts.append(reversed(tokenizer(conversation.get_prompt()).input_ids))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False)))


def refuse_unsupported(model_base: str | None, quantised: bool, attn_implementation: str) -> None:
    """Raise ValueError for an argument of the original loaders that is not supported here."""
    if model_base is not None:
        raise ValueError(f"model_base={model_base!r}: LoRA checkpoints are not supported, merge them first")
    if quantised:
        raise ValueError("load_8bit and load_4bit: quantised models are not supported")
    if attn_implementation not in ATTENTION:
        raise ValueError(f"attn_implementation={attn_implementation!r}: allowed are {', '.join(ATTENTION)}")
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError("attn_implementation='flash_attention_2': the package flash-attn or a GPU is missing")


def load_weights(
    model_class: type[LlavaLlamaForCausalLM],
    folder: Path,
    config: LlavaConfig,
    dtype: torch.dtype,
    device_map: str | dict[str, int | str] | None,
    attn_implementation: str,
) -> Any:
    """Return a model with the weights of a folder; raise ValueError if these are damaged or do not fit `config`."""
    check_shapes(folder, lambda: model_class(config), config, check_files(folder, "tokenizer.model"))
    try:
        return model_class.from_pretrained(
            folder,
            config=config,
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            device_map=device_map,
            attn_implementation=attn_implementation,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the weights cannot be loaded: {error}") from error


def check_shapes(folder: Path, build: Callable[[], nn.Module], config: PretrainedConfig, found: Shapes) -> None:
    """Compare the weights of a checkpoint with those of its model.

    No memory is allocated for the model, since a configuration may say anything. transformers 4.37 does not report
    missing weights of a model that is not yet in memory; this function does.

    Args:
        folder: The checkpoint, for error messages.
        build: Makes the model.
        config: The model's configuration.
        found: The shapes of the checkpoint's weights, by name.

    Raises:
        ValueError: The weights differ, or there is no model of such a configuration.
    """
    found = {name: shape for name, shape in found.items() if not name.endswith(DERIVED)}
    layers, longest = config.num_hidden_layers, getattr(config, "max_position_embeddings", 0)
    integers = isinstance(layers, int) and isinstance(longest, int)
    if not integers or not 0 < layers <= len(found) or longest > MAX_POSITIONS:
        raise ValueError(
            f"{folder}: config.json says num_hidden_layers={layers} and max_position_embeddings={longest}: there "
            f"are {len(found)} weights, and up to {MAX_POSITIONS} positions are supported"
        )
    try:
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: there is no model of such a configuration: {error}") from error
    fault = misfit(found, wanted)
    if fault:
        raise ValueError(f"{folder}: the weights do not fit config.json: {fault}")


def load_tokenizer(folder: Path) -> LlamaTokenizer:
    """Return the sentencepiece tokeniser in a folder; raise ValueError if it is damaged."""
    try:
        return LlamaTokenizer.from_pretrained(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder / 'tokenizer.model'}: damaged, or not a sentencepiece model") from error


def read_config(folder: Path, needed: tuple[str, ...] = NEEDED) -> LlavaConfig:
    """Return the configuration of a LLaVA-1.5 checkpoint; raise ValueError if it is another, or lacks a field."""
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: LoRA checkpoints are not supported, merge them first")
    values = read_json(file)
    if values.get("model_type") not in ("llava", "llava_llama"):
        raise ValueError(f"{file}: model_type={values.get('model_type')!r}: want 'llava'")
    if "text_config" in values:
        raise ValueError(f"{file}: this is the format of transformers' own LLaVA; want the original, liuhaotian/...")
    if values.get("image_aspect_ratio") == "anyres" or values.get("mm_patch_merge_type", "flat") != "flat":
        raise ValueError(f"{file}: LLaVA-1.6 (anyres images) is not supported, only LLaVA-1.5")
    if values.get("mm_use_im_start_end"):
        raise ValueError(f"{file}: mm_use_im_start_end is not supported; no LLaVA-1.5 checkpoint uses it")
    if values.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(f"{file}: mm_vision_select_feature={values['mm_vision_select_feature']!r}: want 'patch'")
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing; the configuration is incomplete")
    return LlavaConfig.from_dict(values)


def check_files(folder: Path, *others: str) -> Shapes:
    """Return the shapes of all weights in a folder, by name.

    Args:
        folder: The folder.
        others: Files that have to be there besides the weights.

    Raises:
        ValueError: A file, which the message names, is missing or damaged; see `read_settings` and `weight_shapes`.
    """
    for name in others:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; the checkpoint is incomplete")
    read_settings(folder)
    shapes = weight_shapes(folder)
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                if tensors.metadata() is None:
                    raise ValueError(f"{file}: transformers 4.37 wants the metadata {{'format': 'pt'}} in it")
    return shapes


def load_tower(folder: Path, config: LlavaConfig, dtype: torch.dtype) -> CLIPVisionTower:
    """Load the vision tower that a configuration names, see `find_tower`."""
    tower = find_tower(folder, config)
    check_tower(tower, check_files(tower, "config.json", "preprocessor_config.json"))
    try:
        clip = CLIPVisionModel.from_pretrained(tower, torch_dtype=dtype)
        processor = CLIPImageProcessor.from_pretrained(tower)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{tower}: the vision tower cannot be loaded: {error}") from error
    return CLIPVisionTower(clip, processor, config.mm_vision_select_layer)


def tower_config(folder: Path) -> CLIPVisionConfig:
    """Return the vision part of a CLIP's configuration in a folder; raise ValueError if it is missing or damaged."""
    values = read_json(folder / "config.json")
    return CLIPVisionConfig.from_dict(values.get("vision_config", values))


def check_tower(folder: Path, found: Shapes) -> CLIPVisionConfig:
    """Return the configuration of a CLIP's vision part; raise ValueError if the weights found do not fit it."""
    config = tower_config(folder)
    own = {name: shape for name, shape in found.items() if name.startswith("vision_model.")}
    check_shapes(folder, lambda: CLIPVisionModel(config), config, own)
    return config
