"""The text tower of the CLIP model that LLaVA's vision tower belongs to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizerFast

from llava.model.vision_tower import CLIPVisionTower
from strategy.backbone import JointSpace


def load_joint_space(source: str, tower: CLIPVisionTower) -> JointSpace:
    """Load the text tower and the projections of a CLIP model, in float32, on the device of the vision tower.

    Args:
        source: A hub id or a folder.
        tower: The vision tower, whose own weights and last norm are used for pictures.

    Raises:
        ValueError: This is no whole CLIP model, or its vision tower has another width.
    """
    try:
        clip, report = CLIPModel.from_pretrained(source, torch_dtype=torch.float32, output_loading_info=True)
        tokenizer = CLIPTokenizerFast.from_pretrained(source)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"clip_text={source!r} cannot be loaded: {error}") from error
    if missing := report["missing_keys"]:
        raise ValueError(f"clip_text={source!r} is no CLIP model with a text tower: {sorted(missing)[0]} is missing")
    own, width = tower.vision_tower, clip.visual_projection.in_features
    if width != own.config.hidden_size:
        raise ValueError(
            f"clip_text={source!r} has a vision tower of width {width}, but that of the model has width "
            f"{own.config.hidden_size}: give the CLIP model that the vision tower was taken from"
        )
    del clip.vision_model
    clip.eval().requires_grad_(False).to(own.device)

    def align(features: Tensor) -> Tensor:
        return clip.visual_projection(own.vision_model.post_layernorm(features).float())

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        return _pieces(tokenizer, texts, clip.config.text_config.max_position_embeddings)

    def embed(ids: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = clip.text_model(input_ids=ids.to(own.device), attention_mask=mask.to(own.device)).last_hidden_state
        rows = torch.arange(len(ids), device=own.device)
        return normalize(clip.text_projection(hidden[rows, lengths.to(own.device) - 1]), dim=-1)

    return JointSpace(align, tokenize, embed)


def _pieces(tokenizer: Any, texts: Sequence[str], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token ids of texts in pieces of up to `longest` tokens, see `JointSpace`."""
    pieces: list[list[int]] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        words = tokenizer(text, add_special_tokens=False).input_ids
        for at in range(0, max(len(words), 1), longest - 2):
            pieces.append([tokenizer.bos_token_id, *words[at : at + longest - 2], tokenizer.eos_token_id])
            owners.append(number)
    lengths = [len(piece) for piece in pieces]
    padded = [piece + [tokenizer.eos_token_id] * (max(lengths) - len(piece)) for piece in pieces]
    return torch.tensor(padded), torch.tensor(lengths), torch.tensor(owners)
