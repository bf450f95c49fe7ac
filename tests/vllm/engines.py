"""vLLM's engine in this process, and the project's own engine on transformers to compare it with."""

import gc
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hf_llava
import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl import modeling_qwen2_vl
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import strategy
from current_vlm.qwen import Qwen25VLBackbone
from strategy.backbone import register_backbone
from vllm_vtr.configuration import KEY, pruning_of

SHAPES = Path(__file__).parents[2] / "examples/shapes"
CHECKPOINTS = SHAPES / "checkpoints"
STEPS = 12


class EarlierQwen2VL(Qwen25VLBackbone):
    """Qwen2-VL in transformers 5.12, whose layers mix the tables of time, row and column themselves."""

    def rotary(self, layer: Any, kwargs: Any) -> Any:
        return _mixed(layer, kwargs["position_embeddings"])

    def rotary_at(self, decoder: Any, positions: Any) -> Any:
        return _mixed(decoder.layers[0], super().rotary_at(decoder, positions))


def _mixed(layer: Any, tables: Any) -> Any:
    sections = layer.self_attn.config.rope_parameters["mrope_section"] * 2
    return tuple(
        torch.cat([part[kind % 3] for kind, part in enumerate(table.split(sections, dim=-1))], dim=-1)
        for table in tables
    )


if hasattr(modeling_qwen2_vl, "apply_multimodal_rotary_pos_emb"):
    register_backbone(EarlierQwen2VL())


@dataclass(frozen=True)
class Question:
    """A prompt, and the pictures or videos, frames [T, H, W, 3], that stand in it."""

    text: str
    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[np.ndarray, ...] = ()


@dataclass
class Answer:
    """The tokens of an answer, and for each stage which of the tokens before it were kept."""

    tokens: list[int]
    kept: list[list[int]] = field(default_factory=list)


def llava_prompt(question: str, pictures: int) -> str:
    return f"USER: {'<image>' * pictures}\n{question} ASSISTANT:"


def qwen_prompt(question: str, visuals: int, kind: str = "image") -> str:
    shown = f"<|vision_start|><|{kind}_pad|><|vision_end|>" * visuals
    return f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = {"llava": llava_prompt, "qwen2": qwen_prompt, "qwen3": qwen_prompt}
TASKS = {"llava": "shapes", "qwen2": "shapes_varied", "qwen3": "shapes_varied"}


def checkpoint(family: str, folder: Path) -> Path:
    """The small checkpoint of a family; LLaVA's is converted into `folder`."""
    if family != "llava":
        return CHECKPOINTS / f"shapes-{family}"
    return hf_llava.convert(CHECKPOINTS / "shapes-llava", folder / "llava")


def questions(family: str, count: int, first: int = 0) -> list[Question]:
    rows = pq.read_table(SHAPES / f"tasks/{TASKS[family]}_test.parquet").slice(first, count).to_pylist()
    return [
        Question(PROMPTS[family](row["question"], 1), (Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),))
        for row in rows
    ]


class Reference:
    """The project's engine on transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def answer(
        self,
        question: Question,
        vtr: dict[str, Any] | None,
        steps: int = STEPS,
        ignore_eos: bool = False,
        shaken_by: int | None = None,
    ) -> Answer:
        """What is answered; with a seed in `shaken_by`, to pictures whose values are changed by a ten-thousandth."""
        shown: dict[str, Any] = {"images": list(question.pictures) or None}
        if question.videos:
            metadata = [timing(video) for video in question.videos]
            shown |= {"videos": list(question.videos), "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(text=[question.text], **shown, return_tensors="pt")
        if shaken_by is not None:
            noise = torch.randn(inputs.pixel_values.shape, generator=torch.Generator().manual_seed(shaken_by))
            inputs["pixel_values"] = inputs.pixel_values * (1 + 1e-4 * noise)
        kept: list[list[int]] = []
        more = {"min_new_tokens": steps} if ignore_eos else {}
        with self._pruned(vtr, lambda view, scores, chosen: kept.append(chosen[0].tolist())):
            ids = self.model.generate(**inputs, max_new_tokens=steps, do_sample=False, **more)
        return Answer(ids[0, inputs.input_ids.shape[1] :].tolist(), kept)

    def agrees(self, found: Answer, question: Question, vtr: dict[str, Any]) -> bool:
        """Whether an answer is the one here, and was found with the same tokens.

        Other tokens count as the same where rounding decides between them: where other ones are kept here too, once the
        picture is changed by a ten-thousandth.
        """
        own = self.answer(question, vtr)
        if found == own:
            return True
        shaken = (self.answer(question, vtr, shaken_by=seed) for seed in range(4))
        return found.tokens == own.tokens and any(each.kept != own.kept for each in shaken)

    def _pruned(self, vtr: dict[str, Any] | None, watch: Any) -> Any:
        if vtr is None:
            return nullcontext()
        return strategy.prune(self.model, strategy.VTRConfig(**vtr, engine="eager"), watch=watch)


class Engine:
    """vLLM's engine, whose scheduler and model runner are at hand."""

    def __init__(self, folder: Path, vtr: dict[str, Any] | None, **more: Any) -> None:
        settings = {
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 27,
            "limit_mm_per_prompt": {"image": 3, "video": 1},
            "additional_config": {} if vtr is None else {KEY: vtr},
        }
        self.llm = LLM(str(folder), **settings | more)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.state = self.runner.model_state
        self.kept: dict[str, list[list[int]]] = {}
        if vtr is not None:
            self._watch()

    def _watch(self) -> None:
        def watch(view: Any, scores: Any, chosen: Any) -> None:
            prefill = self.state.prefill
            for sample, own in zip(view.samples, chosen, strict=True):
                name = prefill.batch.req_ids[prefill.prompts[sample].row]
                self.kept.setdefault(name.partition("-")[0], []).append(own.tolist())

        self.state.runner.watch = watch

    def use(self, vtr: dict[str, Any]) -> None:
        """Prune in another way from now on, which a start of the engine would do too, but slowly."""
        config = self.scheduler.vllm_config
        config.additional_config = {KEY: vtr}
        self.scheduler.pruning = pruning_of(config)
        self.state.prune_by(self.scheduler.pruning)
        # What the tower saw was not recorded, unless the last strategy asked for it too.
        self.core.reset_encoder_cache()
        self._watch()

    def answer(self, asked: Sequence[Question], steps: int = STEPS, **sampling: Any) -> list[Answer]:
        outputs = self.llm.generate([given(each) for each in asked], greedy(steps, **sampling), use_tqdm=False)
        return [self.answer_of(output) for output in outputs]

    def answer_of(self, output: Any) -> Answer:
        return Answer(list(output.outputs[0].token_ids), self.kept.pop(output.request_id.partition("-")[0], []))

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def greedy(steps: int = STEPS, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=steps, temperature=0, **more)


def given(question: Question) -> dict[str, Any]:
    """A question as vLLM takes it."""
    videos = [(video, timing(video) | {"do_sample_frames": False}) for video in question.videos]
    shown = {name: each for name, each in (("image", list(question.pictures)), ("video", videos)) if each}
    return {"prompt": question.text} | ({"multi_modal_data": shown} if shown else {})


def timing(video: np.ndarray) -> dict[str, Any]:
    """When the frames of a video are shown, two a second."""
    count = len(video)
    times = {"fps": 2.0, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count))}
    return times | {"video_backend": "none"}


@contextmanager
def running(folder: Path, vtr: dict[str, Any] | None, **more: Any) -> Iterator[Engine]:
    """An engine that is shut down behind the `with`."""
    engine = Engine(folder, vtr, **more)
    try:
        yield engine
    finally:
        engine.core.shutdown()
        # An engine that is freed later would take the process groups of the next one along.
        vars(engine).clear()
        gc.collect()
        cleanup_dist_env_and_memory()
