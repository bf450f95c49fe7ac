"""How a small vision-language model learns a world, that of shapes or another; shared by all the checkpoints.

Two stages. First the vision tower alone learns what each patch shows (shape, colour and place of an
object, whether its centre lies there), through linear heads that are thrown away. Then everything
learns together to answer: many questions are packed behind each picture, each seeing the picture and
itself only, at the positions it would have if it were alone. To save time most steps show the decoder
a small subset of the visual tokens, those that carry an object and some of the ground; of the last
steps one half shows all tokens and the other half subsets of any size.

Pictures are drawn as training goes on and never repeat. A run that was stopped goes on from its last
saved state and takes the same steps it would have taken.
"""

import argparse
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import world

IGNORED = -100
DENSE_WEIGHT = 0.1  # of what the patches show, while everything learns to answer


class Student(ABC, nn.Module):
    """What training needs to know of a model.

    subject: the module that draws scenes and asks about them. sizes: the pictures' (height, width) in pixels,
    of which each step takes one; cell: the side in pixels of what one visual token shows; visual_width:
    channels of its features. further_loss: what the last call of `answer` has to say beyond its logits.
    """

    subject: ModuleType = world
    sizes: Sequence[tuple[int, int]]
    cell: int
    visual_width: int
    further_loss: Tensor | float = 0.0

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the visual tokens of a picture."""
        return size[0] // self.cell, size[1] // self.cell

    def listen_to(self, layer: nn.Module) -> None:
        """Keep the hidden states [B, L, C] that a decoder layer puts out as `heard`, for a further loss."""
        layer.register_forward_hook(
            lambda module, args, output: setattr(self, "heard", output[0] if isinstance(output, tuple) else output)
        )

    def lesson(self, count: int, seed: int, device: torch.device) -> "Lesson":
        """Draw pictures of one size, and what can be asked about them."""
        size = random.Random(seed).choice(self.sizes)
        scenes, grid = self.subject.sample_scenes(count, seed, size), self.grid(size)
        return Lesson(
            pictures=self.subject.render(scenes, seed, device),
            labels=self.subject.patch_labels(scenes, grid),
            grid=grid,
            asked=[list(self.subject.questions(scenes, index)) for index in range(count)],
        )

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """The tower's features [B, N, visual_width] of a lesson's pictures."""

    @abstractmethod
    def answer(self, features: Tensor, grid: tuple[int, int], kept: Tensor, text: "Packed") -> Tensor:
        """Logits [B, T, vocabulary] of the packed text behind the visual tokens kept [B, K] of a grid."""

    @abstractmethod
    def tokens(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question, from the token after the picture on, and of its answer."""

    @abstractmethod
    def tower_parameters(self) -> Iterable[nn.Parameter]:
        """What the dense stage trains."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the checkpoint in its published format, in half precision."""


@dataclass(frozen=True)
class Lesson:
    """What one step teaches.

    pictures: [B, 3, H, W] in [0, 1], or the frames of clips. labels: what each visual token shows, [B, N],
    see `world.patch_labels`; IGNORED where a token is none of the picture's. grid: rows and columns of a
    picture's or frame's tokens. asked: all questions about each picture or clip.
    """

    pictures: Tensor
    labels: dict[str, Tensor]
    grid: tuple[int, int]
    asked: list[list[world.Question]]


@dataclass(frozen=True)
class Packed:
    """Questions and answers behind each picture: ids, position within the question, question number
    (-1 for padding) and the id to be predicted (or IGNORED), each [B, T]."""

    ids: Tensor
    position: Tensor
    block: Tensor
    target: Tensor

    def mask(self, before: int) -> Tensor:
        """Who sees whom, [B, 1, S, S] bool: `before` causal tokens that all see, then the questions."""
        length = before + self.ids.shape[1]
        block = F.pad(self.block, (before, 0), value=-2)
        same = (block[:, None, :] == block[:, :, None]) | (torch.arange(length, device=block.device) < before)
        return (same & torch.ones_like(same[0]).tril())[:, None]


def pack(student: Student, asked: list[list[world.Question]], device: torch.device | str) -> Packed:
    """Lay each picture's questions with their answers one after the other."""
    rows: list[list[tuple[int, int, int, int]]] = []
    for picture in asked:
        row: list[tuple[int, int, int, int]] = []
        for block, question in enumerate(picture):
            prompt, answer = student.tokens(question.text, question.answer)
            ids = prompt + answer
            target = [IGNORED] * (len(prompt) - 1) + answer
            # The last token predicts nothing, so it need not be there.
            row += [(ids[i], i, block, target[i]) for i in range(len(ids) - 1)]
        rows.append(row)
    longest = max(map(len, rows))
    padded = [row + [(0, 0, -1, IGNORED)] * (longest - len(row)) for row in rows]
    return Packed(*torch.tensor(padded, device=device).unbind(-1))


def kept_patches(labels: dict[str, Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Choose [B, count] tokens in order: those beside the patches, patches that show an object, others at random."""
    shown = labels["shape"]
    order = 2.0 * (shown == IGNORED) + (shown > 0) + torch.rand(shown.shape, generator=generator)
    return order.topk(count, dim=1).indices.sort(dim=1).values


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, [rows * columns, width], from fast to slow."""
    rate = 100 ** -torch.linspace(0, 1, width // 4)
    codes = [torch.arange(side)[:, None] * rate for side in grid]
    row, column = (torch.cat([code.sin(), code.cos()], dim=1) for code in codes)
    row, column = row[:, None].expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


def optimizers(named: Iterable[tuple[str, nn.Parameter]], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, heads, norms and biases."""
    parameters = list(named)
    hidden = [p for name, p in parameters if (".layers." in name or ".blocks." in name) and p.dim() == 2]
    chosen = {id(p) for p in hidden}
    other = [p for _, p in parameters if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: short warm-up, flat, linear to zero over the last 40 %."""
    return min((step + 1) / min(100, steps), 1.0, (steps - step) / (0.4 * steps))


class Run:
    """A training run that can be stopped and taken up again."""

    def __init__(self, student: Student, options: argparse.Namespace) -> None:
        self.student = student.to(options.device)
        self.options = options
        self.heads = nn.ModuleDict(
            {name: nn.Linear(student.visual_width, classes) for name, classes in student.subject.LABELS.items()}
        ).to(options.device)
        self.state_file = Path(options.work) / "state.pt"
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        self.saved = torch.load(self.state_file, map_location=options.device) if self.state_file.exists() else {}
        if self.saved:
            self.student.load_state_dict(self.saved["student"])
            self.heads.load_state_dict(self.saved["heads"])

    def stage(
        self,
        name: str,
        steps: int,
        rate: float,
        parameters: Iterable[tuple[str, nn.Parameter]],
        loss: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    ) -> None:
        """Take the stage's remaining steps, saving the state now and then and at the end."""
        done = self.saved.get("done", {}).get(name, 0)
        if done >= steps:
            return
        optims = optimizers(parameters, rate)
        if done:
            for optim, state in zip(optims, self.saved["optims"], strict=True):
                optim.load_state_dict(state)
        bar = tqdm(range(done, steps), desc=name, initial=done, total=steps, mininterval=5)
        saved_at = time.monotonic()
        for step in bar:
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = rate * rate_at(step, steps)
            with torch.autocast(self.options.device.type, torch.bfloat16):
                value, shown = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_([p for o in optims for g in o.param_groups for p in g["params"]], 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.3f}", **{k: f"{v:.3f}" for k, v in shown.items()})
            if step + 1 == steps or time.monotonic() - saved_at > self.options.save_seconds:
                self._save(name, step + 1, optims)
                saved_at = time.monotonic()

    def _save(self, name: str, done: int, optims: list[torch.optim.Optimizer]) -> None:
        self.saved = {
            "student": self.student.state_dict(),
            "heads": self.heads.state_dict(),
            "done": self.saved.get("done", {}) | {name: done},
            "optims": [optim.state_dict() for optim in optims],
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(self.saved, partial)
        partial.replace(self.state_file)

    def _draw(self, stage: int, step: int) -> Lesson:
        seed = world.FIRST_TRAINING_SEED * (1 + stage) + step
        return self.student.lesson(self.options.batch, seed, self.options.device)

    def dense_loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of what each patch shows."""
        lesson = self._draw(0, step)
        return self._dense(self.student.encode(lesson.pictures), lesson.labels)

    def _dense(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        total, shown = features.new_zeros(()), {}
        for name, head in self.heads.items():
            logits, target = head(features).float().flatten(0, 1), labels[name].flatten().to(features.device)
            loss, shows = F.cross_entropy(logits, target, reduction="none"), target > 0
            # Most patches show ground; those that show an object weigh as much as all of them together.
            total = total + loss.mean() + loss[shows].mean()
            shown[name] = (logits.argmax(-1) == target)[shows].float().mean()
        return total, shown

    def answer_loss(self, step: int, visual_share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of the packed answers behind a share of the visual tokens, plus the dense one."""
        lesson = self._draw(1, step)
        rng = random.Random(step)
        asked = [world.choose(candidates, self.options.questions, rng) for candidates in lesson.asked]
        text = pack(self.student, asked, self.options.device)
        features = self.student.encode(lesson.pictures)
        dense, shown = self._dense(features, lesson.labels)
        count = round(visual_share * features.shape[1])
        kept = kept_patches(lesson.labels, count, torch.Generator().manual_seed(step)).to(features.device)
        logits = self.student.answer(features, lesson.grid, kept, text).float()
        answers = text.target != IGNORED
        logits, target = logits[answers], text.target[answers]
        right = (logits.argmax(-1) == target).float().mean()
        loss = F.cross_entropy(logits, target) + DENSE_WEIGHT * (dense + self.student.further_loss)
        return loss, shown | {"right": right}

    def train(self) -> None:
        """Both stages, then the checkpoint."""
        o = self.options
        tower = {id(p) for p in self.student.tower_parameters()}
        everything = [*self.student.named_parameters(), *self.heads.named_parameters()]
        dense = [(n, p) for n, p in everything if id(p) in tower] + list(self.heads.named_parameters())
        self.stage("dense", o.dense_steps, o.dense_rate, dense, self.dense_loss)
        subset_steps = round(o.answer_steps * (1 - o.full_share))

        def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            some = o.subset if step < subset_steps else random.Random(step).uniform(o.subset, 1)
            return self.answer_loss(step, 1 if step >= subset_steps and step % 2 else some)

        self.stage("answers", o.answer_steps, o.answer_rate, everything, loss)
        self.student.export(Path(o.out))


def options(description: str, **defaults: float) -> argparse.Namespace:
    """The command line of a training script, with defaults of its own where it has them."""
    parser = argparse.ArgumentParser(description=description)
    gpu = torch.cuda.is_available()
    parser.add_argument("--out", required=True, help="folder for the checkpoint")
    parser.add_argument("--work", required=True, help="folder for the saved state; run again to go on")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if gpu else "cpu"))
    parser.add_argument("--batch", type=int, default=64, help="pictures a step")
    parser.add_argument("--questions", type=int, default=20, help="questions behind each picture")
    parser.add_argument("--dense-steps", type=int, default=1350)
    parser.add_argument("--answer-steps", type=int, default=1450)
    parser.add_argument("--dense-rate", type=float, default=2e-3)
    parser.add_argument("--answer-rate", type=float, default=1.5e-3)
    parser.add_argument("--subset", type=float, default=0.28, help="share of the visual tokens shown at first")
    parser.add_argument(
        "--full-share", type=float, default=0.25, help="share of steps that show all of them, or any number"
    )
    parser.add_argument("--save-seconds", type=float, default=120, help="how often the state is saved")
    parser.set_defaults(**defaults)
    return parser.parse_args()
