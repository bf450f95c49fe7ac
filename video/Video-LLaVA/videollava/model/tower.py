"""The CLIP towers for pictures and for videos, which encode a video frame by frame."""

from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionTransformer


class FrameTower(nn.Module):
    """A frozen CLIP vision model, whose features are those of a hidden layer.

    Args:
        kind: "image" or "video", which is part of the weights' names in the checkpoint.
        config: The model's configuration.
        select_layer: The index into the hidden states, as in `mm_vision_select_layer`.

    Raises:
        ValueError: The model has no such layer.
    """

    def __init__(self, kind: str, config: CLIPVisionConfig, select_layer: int) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        if not -depth - 1 <= select_layer <= depth:
            raise ValueError(f"mm_vision_select_layer={select_layer}: the {kind} tower has {depth} layers")
        self.config, self.kind, self.select_layer = config, kind, select_layer
        self.add_module(f"{kind}_tower", CLIPVisionTransformer(config))
        self.requires_grad_(False)

    @property
    def side(self) -> int:
        """Return the number of patches along a side of a frame."""
        return self.config.image_size // self.config.patch_size

    def forward(self, frames: Tensor) -> Tensor:
        """Return the features [count, 1 + N, width] of frames [count, 3, side, side], the class token first."""
        tower = getattr(self, f"{self.kind}_tower")
        weight = tower.embeddings.class_embedding
        frames = frames.to(weight.device, weight.dtype)
        return tower(frames, output_hidden_states=True).hidden_states[self.select_layer]


def config_from_shapes(shapes: dict[str, tuple[int, ...]], prefix: str) -> CLIPVisionConfig:
    """Infer the configuration of a CLIP tower from its weights.

    Every CLIP has heads 64 wide; the activation is OpenAI's, as in transformers' own port of Video-LLaVA.

    Args:
        shapes: The shapes of weights, by name.
        prefix: What the names of the tower's weights begin with.

    Raises:
        ValueError: The weights are not those of a CLIP.
    """
    try:
        width, _, patch, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
        places, _ = shapes[f"{prefix}embeddings.position_embedding.weight"]
        inner, _ = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the weights under {prefix} are not those of a CLIP vision tower: {error}") from error
    layers = {
        name.removeprefix(f"{prefix}encoder.layers.").split(".")[0] for name in shapes if f"{prefix}encoder." in name
    }
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=patch * round((places - 1) ** 0.5),
    )
