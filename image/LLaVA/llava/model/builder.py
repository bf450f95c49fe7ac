"""Loading a checkpoint in LLaVA-1.5's original format."""

import json
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPImageProcessor, LlamaTokenizer

from llava.model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.vision_tower import CLIPVisionTower

# Buffers that older checkpoints hold although every model computes them itself.
DERIVED = "rotary_emb.inv_freq"


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, int | str] | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[LlamaTokenizer, LlavaLlamaForCausalLM, CLIPImageProcessor, int]:
    """Load (tokenizer, model, image processor, context length).

    model_path: a folder, or the id of a repository on the hub. model_name is taken for callers' sake.
    device: CUDA if there is one, else the CPU. dtype: float16 on CUDA, else float32. Raises ValueError,
    in one sentence that names the file, for what is missing, damaged or not LLaVA-1.5.
    """
    if model_base is not None:
        raise ValueError(f"model_base={model_base!r}: LoRA checkpoints are not supported, merge them first")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    folder = find_folder(model_path)
    config = read_config(folder)
    check_weights(folder)
    try:
        model, report = LlavaLlamaForCausalLM.from_pretrained(
            folder,
            config=config,
            torch_dtype=dtype,
            low_cpu_mem_usage=True,
            device_map=device_map,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights cannot be loaded: {error}") from error
    missing = report["missing_keys"]
    left_over = [key for key in report["unexpected_keys"] if not key.endswith(DERIVED)]
    if missing or left_over:
        found = f"missing {missing or 'none'}, left over {left_over or 'none'}"
        raise ValueError(f"{folder}: the weights do not fit config.json: {found}")
    model.model.vision_tower = load_tower(folder, config, dtype)
    if device_map is None:
        model.to(device)
    else:
        model.model.vision_tower.to(model.device)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    context = int(getattr(config, "max_sequence_length", 2048))
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, context


def find_folder(path: str) -> Path:
    """A folder as it is, or a repository of the hub once it is downloaded; ValueError if it is neither."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path))
    except Exception as error:
        raise ValueError(f"{path!r} is not a folder, and the hub did not give it ({type(error).__name__})") from error


def read_config(folder: Path) -> LlavaConfig:
    """The configuration of a LLaVA-1.5 checkpoint; ValueError if it is anything else."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: missing or not JSON ({error})") from error
    if "text_config" in values:
        raise ValueError(f"{file}: this is the format of transformers' own LLaVA; want the original, liuhaotian/...")
    if values.get("model_type") not in ("llava", "llava_llama"):
        raise ValueError(f"{file}: model_type={values.get('model_type')!r}: want 'llava'")
    if values.get("image_aspect_ratio") == "anyres" or values.get("mm_patch_merge_type", "flat") != "flat":
        raise ValueError(f"{file}: LLaVA-1.6 (anyres images) is not supported, only LLaVA-1.5")
    if values.get("mm_use_im_start_end"):
        raise ValueError(f"{file}: mm_use_im_start_end is not supported; no LLaVA-1.5 checkpoint uses it")
    if not values.get("mm_vision_tower"):
        raise ValueError(f"{file}: mm_vision_tower is missing: want a folder or the id of a CLIP model")
    return LlavaConfig.from_dict(values)


def check_weights(folder: Path) -> None:
    """Raise ValueError that names the weight file which is missing, cut off or no weight file at all."""
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    if indices:
        names = set(json.loads(indices[0].read_text())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")][:1]
    if not files:
        raise ValueError(f"{folder}: no weights (*.safetensors or *.bin) in this folder")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing; the checkpoint is incomplete")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file}: damaged or cut off ({error})") from error
        elif not zipfile.is_zipfile(file):
            raise ValueError(f"{file}: damaged or cut off (not a PyTorch archive)")


def load_tower(folder: Path, config: LlavaConfig, dtype: torch.dtype) -> CLIPVisionTower:
    """The vision tower that a configuration names: a folder in the checkpoint, any folder, or a hub id."""
    inside = folder / config.mm_vision_tower
    tower = inside if inside.is_dir() else find_folder(config.mm_vision_tower)
    check_weights(tower)
    keep_class = getattr(config, "mm_vision_select_feature", "patch") == "cls_patch"
    return CLIPVisionTower(tower, config.mm_vision_select_layer, keep_class, dtype)
