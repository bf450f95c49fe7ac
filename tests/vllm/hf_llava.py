"""The small LLaVA in the format of llava-hf, whose names and image token differ from the original's."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

RENAMED = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act", "max_position_embeddings"),
)
TEMPLATE = "USER: <image>\n{} ASSISTANT:"


def convert(source: Path, folder: Path) -> Path:
    """Write the checkpoint in `source` to `folder` in the format of transformers, and return the folder."""
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    vision = json.loads((source / "vision_tower/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessor.from_pretrained(source / "vision_tower"),
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        old = next(old for old in RENAMED if name.startswith(old))
        weights[RENAMED[old] + name.removeprefix(old)] = tensor
    for name, tensor in load_file(source / "vision_tower/model.safetensors").items():
        weights[f"vision_tower.{name}"] = tensor
    # The image token gets a row, which nothing reads.
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = image + 1 - len(weights[name])
        weights[name] = torch.cat((weights[name], weights[name].new_zeros(rows, weights[name].shape[1])))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = {name: config[name] for name in TEXT} | {"model_type": "llama", "vocab_size": image + 1}
    written = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float16",
        "image_token_index": image,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder
