"""What the small Qwen checkpoints share: tokeniser, prompt, tower and the way they are taught."""

import functools
import shutil
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F

import training
import world

SYSTEM = "You are a helpful assistant."
IMAGE, VIDEO, START, END, TURN, OVER, PAD = (
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)
PIECES = 512  # of the tokeniser, bytes included, special tokens not
# One turn after the other, each picture as one token that the processor repeats.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


TOKENIZER = {
    "unk_token": PAD,
    "eos_token": OVER,
    "pad_token": PAD,
    "additional_special_tokens": [TURN, OVER, START, END, IMAGE, VIDEO],
    "model_max_length": 4096,
}
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


SIDE = 24  # of a table of position codes, which is stretched over each picture
CODED_TOWER = {
    "depth": 5,
    "hidden_size": 80,
    "intermediate_size": 256,
    "num_heads": 5,
    "out_hidden_size": DECODER["hidden_size"],
    "num_position_embeddings": SIDE**2,
}


def set_position_codes(tower: Any) -> None:
    """Write sines into a tower's table: left random, codes hardly come to tell it where in the picture a patch lies."""
    codes = tower.pos_embed.weight
    codes.data.copy_(training.sine_positions((SIDE, SIDE), codes.shape[1]))


def coded_processor(kind: type, images: type, tokenizer: Any, videos: type) -> Any:
    """The processor of a model with such a tower."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return kind(images(patch_size=16, **half), tokenizer, videos(**half), chat_template=CHAT_TEMPLATE)


def build(kind: type, config: type, tokenizer: Any, decoder: dict[str, Any], tower: dict[str, Any]) -> Any:
    """An untrained model; decoder, tower: what its family says of them beyond DECODER."""
    special = {"bos": PAD, "eos": OVER, "pad": PAD}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    visual = {"image": IMAGE, "video": VIDEO, "vision_start": START, "vision_end": END}
    model = kind(
        config(
            text_config=DECODER | {"vocab_size": len(tokenizer)} | ids | decoder,
            vision_config=tower,
            **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in visual.items()},
        )
    )
    model.generation_config.update(**ids)
    return model


def prompt(question: str) -> str:
    """A question about one picture in the words of the chat template."""
    return f"{TURN}system\n{SYSTEM}{OVER}\n{TURN}user\n{START}{IMAGE}{END}{question}{OVER}\n{TURN}assistant\n"


def train_tokenizer(folder: Path) -> dict[str, str]:
    """Byte-level BPE of the few words this world needs; the files of its vocabulary and its merges."""
    files = {name: str(folder / name) for name in ("vocab.json", "merges.txt")}
    if not all(Path(file).exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        corpus = {SYSTEM, "system\n", "user\n", "assistant\n"}
        for seed in range(20):
            scenes = world.sample_scenes(64, world.FIRST_TRAINING_SEED + seed)
            corpus |= {part for i in range(64) for q in world.questions(scenes, i) for part in (q.text, q.answer)}
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(sorted(corpus), vocab_size=PIECES, show_progress=False)
        tokenizer.save_model(str(folder))
    return files


def visual_patches(pictures: Tensor, patch: int, merge: int = 2, frames: int = 2) -> Tensor:
    """Cut pictures [B, 3, H, W] as Qwen's image processors do, [B * patches, 3 * frames * patch * patch]."""
    size, cell = pictures.shape, patch * merge
    cut = pictures.view(size[0], 3, size[2] // cell, merge, patch, size[3] // cell, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*(-1,) * 6, frames, -1, -1)
    return cut.flatten(5).flatten(0, 4)


def attend(
    module: Any, rotate: Any, hidden: Tensor, pictures: int, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """A tower's attention over pictures of one size at once; the stock one takes them one by one."""
    q, k, v = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    q, k = rotate(q, k, *position_embeddings)
    q, k, v = (x.unflatten(0, (pictures, -1)).transpose(1, 2).to(v.dtype) for x in (q, k, v))
    return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))


class QwenStudent(training.Student):
    """A Qwen-VL model with its processor, taught through its own modules."""

    grids = ((16, 16), (14, 18), (18, 14), (13, 17), (17, 13), (12, 18), (18, 12), (15, 19), (19, 15), (17, 17))

    def __init__(self, model: Any, processor: Any, rotate: Any) -> None:
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        vision = model.config.vision_config
        self.patch, self.cell = vision.patch_size, vision.patch_size * vision.spatial_merge_size
        self.sizes = [(rows * self.cell, columns * self.cell) for rows, columns in self.grids]
        tower = self.tower
        # As a convolution this product of a matrix is many times slower.
        tower.patch_embed.forward = lambda x: F.linear(
            x, tower.patch_embed.proj.weight.flatten(1), tower.patch_embed.proj.bias
        )
        for block in tower.blocks:
            block.attn.forward = lambda hidden, cu_seqlens, position_embeddings, m=block.attn, **_: attend(
                m, rotate, hidden, len(cu_seqlens) - 1, position_embeddings
            )
        ids = self.tokenizer(prompt("?"))["input_ids"]
        self.image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        self.register_buffer("before", torch.tensor(ids[: ids.index(self.image)]), persistent=False)
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.model.model.visual

    @abstractmethod
    def features(self, output: Any) -> Tensor:
        """What the tower's output gives the decoder, [B * N, visual_width]."""

    def show(self, shown: Tensor, before: int, length: int) -> tuple[Tensor, dict[str, Any]]:
        """The embeddings [B, K, C] of the features shown, and further arguments of the decoder."""
        return shown, {}

    def encode(self, pictures: Tensor) -> Tensor:
        pixels = visual_patches((pictures - self.image_mean) / self.image_std, self.patch)
        rows, columns = (side // self.patch for side in pictures.shape[2:])
        # Frames of a video do not see each other, so a batch of pictures goes through as one.
        grid = torch.tensor([[len(pictures), rows, columns]], device=pixels.device)
        return self.features(self.tower(pixels, grid_thw=grid)).unflatten(0, (len(pictures), -1))

    def answer(self, features: Tensor, grid: tuple[int, int], kept: Tensor, text: training.Packed) -> Tensor:
        batch, start = len(features), len(self.before)
        shown = features.gather(1, kept[:, :, None].expand(-1, -1, features.shape[2]))
        visual, more = self.show(shown, start, start + kept.shape[1] + text.ids.shape[1])
        embed = self.model.get_input_embeddings()
        embeddings = torch.cat(
            [embed(self.before).expand(batch, -1, -1), visual.to(embed.weight.dtype), embed(text.ids)], dim=1
        )
        head = torch.arange(start, device=kept.device).expand(batch, -1)
        tail = start + max(grid) + text.position
        places = (torch.zeros_like(kept), kept // grid[1], kept % grid[1])
        positions = torch.stack([torch.cat([head, start + place, tail], dim=1) for place in places])
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=self.mask(text, start + kept.shape[1]),
            position_ids=positions,
            use_cache=False,
            **more,
        ).last_hidden_state
        self.examine(start, places)
        return self.model.lm_head(hidden[:, start + kept.shape[1] :])

    def mask(self, text: training.Packed, before: int) -> Tensor | None:
        """Who sees whom in the decoder, `before` tokens and the text behind them; None for causal attention."""
        return text.mask(before)

    def examine(self, before: int, places: tuple[Tensor, ...]) -> None:
        """Set `further_loss`, if there is one; places: frame, row and column [B, K] of the tokens after `before`."""

    @functools.cache  # noqa: B019  one student lives as long as the script
    def tokens(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        asked = self.tokenizer(prompt(question))["input_ids"]
        return asked[asked.index(self.image) + 1 :], self.tokenizer(answer + OVER)["input_ids"]

    def tower_parameters(self) -> Iterable[nn.Parameter]:
        return self.tower.parameters()

    def export(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.model.half().save_pretrained(folder)
        self.processor.save_pretrained(folder)
