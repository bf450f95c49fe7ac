"""Train `shapes-llava` from scratch and write it in the original LLaVA-1.5 format."""

import functools
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

import training
import world
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token

TOWER = CLIPVisionConfig(
    hidden_size=192, intermediate_size=704, num_hidden_layers=5, num_attention_heads=6, image_size=336, patch_size=14
)
VOCABULARY = 576
DECODER = {
    "hidden_size": 192,
    "intermediate_size": 480,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def prompt(question: str, answer: str | None, frames: int = 1, template: str = "vicuna_v1") -> str:
    """A question about one picture, or about some frames, as a conversation of a template."""
    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN * frames}\n{question}")
    conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


def load_tokenizer(
    folder: Path, asked: Callable[[], Iterable[world.Question]], template: str = "vicuna_v1"
) -> LlamaTokenizer:
    """The run's tokeniser, trained on such questions when it first starts."""
    file = folder / "tokenizer.model"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(train_tokenizer(asked(), template))
    return LlamaTokenizer(str(file), legacy=True, model_max_length=2048, pad_token="<unk>")


def asked(subject: ModuleType = world) -> Iterator[world.Question]:
    """Questions about a world, enough to meet every word."""
    for seed in range(20):
        scenes = subject.sample_scenes(64, world.FIRST_TRAINING_SEED + seed)
        for index in range(64):
            yield from subject.questions(scenes, index)


def train_tokenizer(asked: Iterable[world.Question], template: str) -> bytes:
    """A sentencepiece model of the few words this world needs, with bytes for everything else."""
    questions = {(question.text, question.answer) for question in asked}
    texts = [prompt(text, answer, template=template) for text, answer in questions]
    corpus = [text.replace("</s>", "").replace(DEFAULT_IMAGE_TOKEN, "") for text in texts]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(corpus)),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["What", "How", "Is", "Where"],
        minloglevel=2,
    )
    return model.getvalue()


class LlavaStudent(training.Student):
    """A CLIP tower, a two-layer projector and a Llama decoder."""

    sizes = ((336, 336),)
    cell = TOWER.patch_size
    visual_width = TOWER.hidden_size
    frames = 1
    template = "vicuna_v1"
    tower_config = TOWER
    decoder_config = DECODER

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_convert_rgb=True
        )
        self.tower = CLIPVisionModel(self.tower_config)
        # Left random, the position codes never came to tell the tower where in the picture a patch lies.
        positions = self.tower.vision_model.embeddings.position_embedding.weight
        positions.data[1:] = training.sine_positions(self.grid(self.sizes[0]), self.visual_width)
        self.decoder = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **self.decoder_config))
        for layer in self.decoder.model.layers:
            # transformers 4.37 cuts the rotary table to the sequence's length, but a subset of the
            # visual tokens keeps its positions, which reach beyond that.
            layer.self_attn.rotary_emb.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {"seq_len": module.max_position_embeddings}), with_kwargs=True
            )
        width = self.decoder.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(self.visual_width, width), nn.GELU(), nn.Linear(width, width))
        ids = tokenizer_image_token(self.prompt("?", None), tokenizer)
        self.register_buffer("before", torch.tensor(ids[: ids.index(IMAGE_TOKEN_INDEX)]), persistent=False)
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(self.processor, name)).view(3, 1, 1), persistent=False)

    def prompt(self, question: str, answer: str | None) -> str:
        """A question about what one lesson's picture or clip shows."""
        return prompt(question, answer, self.frames, self.template)

    def encode(self, pictures: Tensor) -> Tensor:
        pixels = (pictures - self.image_mean) / self.image_std
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def answer(self, features: Tensor, grid: tuple[int, int], kept: Tensor, text: training.Packed) -> Tensor:
        batch, count, start = len(features), features.shape[1], len(self.before)
        shown = features.gather(1, kept[:, :, None].expand(-1, -1, features.shape[2]))
        embed = self.decoder.get_input_embeddings()
        embeddings = torch.cat(
            [embed(self.before).expand(batch, -1, -1), self.projector(shown), embed(text.ids)], dim=1
        )
        head = torch.arange(start, device=kept.device).expand(batch, -1)
        positions = torch.cat([head, start + kept, start + count + text.position], dim=1)
        before = start + kept.shape[1]
        hidden = self.decoder.model(
            inputs_embeds=embeddings, attention_mask=text.mask(before).to(embeddings.dtype), position_ids=positions
        ).last_hidden_state
        return self.decoder.lm_head(hidden[:, before:])

    @functools.cache  # noqa: B019  one student lives as long as the script
    def tokens(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        asked = tokenizer_image_token(self.prompt(question, None), self.tokenizer)
        whole = tokenizer_image_token(self.prompt(question, answer), self.tokenizer)
        assert whole[: len(asked)] == asked, "the answer must not change how its question is tokenised"
        return asked[asked.index(IMAGE_TOKEN_INDEX) + self.frames :], whole[len(asked) :]

    def tower_parameters(self) -> Iterable[nn.Parameter]:
        return self.tower.parameters()

    def export(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fields = self.export_towers(folder)
        self.tokenizer.save_pretrained(folder)
        projector = {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        weights = self.decoder.state_dict() | projector | self.inside_towers()
        halves = {name: tensor.half().contiguous().cpu() for name, tensor in weights.items()}
        save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.decoder.config.to_diff_dict() | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "torch_dtype": "float16",
            "mm_hidden_size": self.visual_width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": self.decoder.config.max_position_embeddings,
            "use_mm_proj": True,
        }
        (folder / "config.json").write_text(json.dumps(config | fields, indent=2, sort_keys=True) + "\n")
        generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        generation["max_length"] = self.decoder.config.max_position_embeddings
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    def export_towers(self, folder: Path) -> dict[str, str]:
        """Write the towers that lie beside the weights; returns what the configuration says of all."""
        tower_folder = folder / "vision_tower"
        self.tower.half().save_pretrained(tower_folder)
        self.processor.save_pretrained(tower_folder)
        return {"mm_vision_tower": tower_folder.name}

    def inside_towers(self) -> dict[str, Tensor]:
        """The weights of towers that lie among the others."""
        return {}


def main(student: type[LlavaStudent], description: str | None, **defaults: float) -> None:
    """Train a student and export it, with the options of `training.options` and defaults of its own."""
    options = training.options(str(description), **defaults)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(Path(options.work), lambda: asked(student.subject))
    training.Run(student(tokenizer), options).train()


if __name__ == "__main__":
    main(LlavaStudent, __doc__)
