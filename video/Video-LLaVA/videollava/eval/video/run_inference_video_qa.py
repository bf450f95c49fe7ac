"""Answer the questions of a zero-shot video question answering benchmark with Video-LLaVA, pruned or not."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import strategy
from llava.mm_utils import pad_left
from llava.model.builder import find_folder
from strategy.config import field_names
from strategy.distributed import collectives, processes, watchdog
from videollava.constants import IMAGE_TOKEN_INDEX
from videollava.conversation import conv_templates
from videollava.eval.video.answers import AnswerFile, chunk_name, merge, rank_name
from videollava.eval.video.matching import matches
from videollava.eval.video.questions import LeftOut, Sample, chunk, find_video, read_samples
from videollava.mm_utils import load_video, prepare_prompt, prepare_video, tokenizer_image_token
from videollava.model.builder import fingerprint, load_pretrained_model

TEMPLATE = "llava_v1"
MAX_NEW_TOKENS = 1024
INCOMPLETE = 3  # exit status of a run that left something out

KNOBS = {
    "enabled": "prune; without it, the unpruned baseline",
    "strategy": f"how tokens are scored: {', '.join(strategy.available())}",
    "keep_tokens": "budget in tokens, of 2048",
    "retain_ratio": "the same as a share, in place of --vtr_keep_tokens",
    "budget_basis": "what the budget counts: stages, mean or flops",
    "prune_layer": "layers to prune at",
    "ref_layers": "layer whose input is the reference of the spectral evolution",
    "clse_cutoff_ratio": "width of the Gaussian that is taken out, in units of half the grid's shorter side",
    "clse_temp": "temperature of the evolution factor",
    "clse_fft_3d": "filter over the frames too",
    "query_aggregation": "priortr: the whole question or its last token alone",
    "head_aggregation": "priortr: mean or max of the heads",
    "engine": "graph: fused layers and CUDA graphs; eager: the stock loop; auto: the first on a GPU",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--video_dir", required=True, help="folder of videos")
    data.add_argument("--gt_file_question", required=True, help="test_q.json: question_id, video_name, question")
    data.add_argument("--gt_file_answers", required=True, help="test_a.json: question_id, answer, type")
    data.add_argument("--num_samples", type=int, help="only the first so many questions; all if not given")
    data.add_argument("--num_chunks", type=int, default=1, help="parts the questions are split into")
    data.add_argument("--chunk_idx", type=int, default=0, help="the part to answer; the last to end joins them all")
    data.add_argument("--batch_size", type=int, default=1, help="questions answered at a time")
    data.add_argument("--strict", action="store_true", help="stop at the first question that cannot be answered")
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", required=True, help="folder for the answers")
    out.add_argument("--output_name", required=True, help="name of the file of answers, without .json")
    model = parser.add_argument_group("model")
    model.add_argument("--model_path", required=True, help="folder or hub id of the weights")
    model.add_argument("--model_base", help="refused: LoRA weights must be merged first")
    model.add_argument("--cache_dir", help="where what the hub gives is kept")
    model.add_argument("--device", help="cpu, cuda, cuda:1, ...; CUDA if there is one, else the CPU")
    model.add_argument("--model_max_length", type=int, help="longest prompt with its answer; the checkpoint's own")
    knobs = parser.add_argument_group("pruning")
    for name in field_names():
        # A flag alone means True, but `--vtr_enabled False` must not.
        flag = {"nargs": "?", "const": True} if name in ("enabled", "clse_fft_3d") else {}
        default = False if name == "enabled" else None
        knobs.add_argument(f"--vtr_{name}", default=default, help=KNOBS[name].replace("%", "%%"), **flag)
    return parser.parse_args(arguments)


def run_settings(options: argparse.Namespace, config: strategy.VTRConfig) -> dict[str, Any]:
    """What must not change between two runs that write the same file."""
    names = ("model_path", "model_max_length", "num_samples", "num_chunks", "chunk_idx")
    files = {name: getattr(options, name) for name in ("gt_file_question", "gt_file_answers")}
    digests = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()}
    weights = fingerprint(find_folder(options.model_path, options.cache_dir))
    pruning = asdict(config) if config.enabled else {"enabled": False}
    return {name: getattr(options, name) for name in names} | digests | {"weights": weights} | pruning


class Answerer:
    """A loaded model that answers questions about videos in a folder; arguments as on the command line."""

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        device: str | None = None,
        cache_dir: str | None = None,
        model_max_length: int | None = None,
        video_dir: str = ".",
    ) -> None:
        self.tokenizer, self.model, context = load_pretrained_model(
            model_path, model_base, device=device, cache_dir=cache_dir
        )
        self.limit = model_max_length or context
        self.video_dir = video_dir

    def prepare(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Token ids and video of a question; ValueError if the video is missing or cannot be decoded."""
        tower = self.model.model.video_tower
        video = prepare_video(load_video(find_video(self.video_dir, sample.video)), tower.config.image_size)
        conversation = conv_templates[TEMPLATE].copy()
        conversation.append_message(conversation.roles[0], prepare_prompt(sample.question))
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, "pt")
        prompt = len(ids) + int((ids == IMAGE_TOKEN_INDEX).sum()) * tower.side**2
        if prompt >= self.limit:
            raise ValueError(f"the prompt has {prompt} tokens, --model_max_length allows {self.limit}")
        return ids, video

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
        """The answers to prepared questions, all at once."""
        prompts, videos = zip(*prepared, strict=True)
        ids, mask = pad_left(prompts)
        frames = (ids == IMAGE_TOKEN_INDEX).sum(1) * self.model.model.video_tower.side**2
        room = [min(MAX_NEW_TOKENS, self.limit - int(prompt)) for prompt in mask.sum(1) + frames]
        new = self.model.generate(
            ids,
            images=list(videos),
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(room),
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        rows = [row[:most] for row, most in zip(new, room, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def answer(self, samples: Sequence[Sample]) -> list[str | ValueError]:
        """For each question its answer, or what keeps it from being answered."""
        try:
            return list(self([self.prepare(sample) for sample in samples]))
        except ValueError as error:
            # Whichever it is, the others are answered without it.
            return [error] if len(samples) == 1 else [self.answer([sample])[0] for sample in samples]


def answer_all(
    answerer: Answerer, waiting: list[Sample], answers: AnswerFile, batch_size: int, strict: bool
) -> list[LeftOut]:
    """Answer questions, in order, into a file that may hold others; returns what could not be answered."""
    left_out = []
    right, done = sum(matches(entry["pred"], entry["answer"]) for entry in answers.done.values()), len(answers.done)
    place = {"total": done + len(waiting), "initial": done, "disable": processes.rank() > 0}
    with tqdm(**place, desc="Answering", unit="question") as bar:
        for start in range(0, len(waiting), batch_size):
            watchdog.heartbeat()
            batch = waiting[start : start + batch_size]
            for sample, said in zip(batch, answerer.answer(batch), strict=True):
                if isinstance(said, str):
                    answers.add(sample, said)
                    right += matches(said, sample.answer)
                elif strict:
                    raise ValueError(f"question {sample.id}: {said}") from said
                else:
                    left_out.append(LeftOut(sample.id, sample.video, str(said)))
            bar.set_postfix(accuracy=f"{right / max(1, len(answers.done)):.3f}", left_out=len(left_out), refresh=False)
            bar.update(len(batch))
    return left_out


def open_answers(folder: Path, name: str, settings: dict[str, Any]) -> tuple[AnswerFile, set[str]]:
    """The file this process writes, and the keys of what is answered already, in the files of all processes.

    However many there were before, the first one takes in what they left while the others wait.
    """
    if processes.rank():
        [done, *_] = collectives.gather(None)
        return AnswerFile(folder, rank_name(name, processes.rank()), settings), set(done)
    answers = AnswerFile(folder, name, settings)
    try:
        answers.take_in()
    except ValueError:
        answers.close()
        raise
    [done, *_] = collectives.gather(list(answers.done))
    return answers, set(done)


def main() -> int:
    """Answer, and return the exit status: 0, or INCOMPLETE if something was left out."""
    options = parse()
    folder = Path(options.output_dir)
    try:
        processes.rank_timeout()
        knobs = {name: getattr(options, f"vtr_{name}") for name in field_names()}
        config = strategy.VTRConfig(**{name: value for name, value in knobs.items() if value is not None})
        samples, left_out = read_samples(options.gt_file_question, options.gt_file_answers)
        if left_out and options.strict:
            raise ValueError(f"{left_out[0].reason} (--strict)")
        if options.batch_size < 1:
            raise ValueError(f"--batch_size {options.batch_size}: allowed is a whole number from 1 up")
        chunked = chunk(samples[: options.num_samples], options.num_chunks, options.chunk_idx)
        name = chunk_name(options.output_name, options.num_chunks, options.chunk_idx)
        answers, done = open_answers(folder, name, run_settings(options, config))
        try:
            mine = [sample for sample in chunked if sample.key not in done][processes.rank() :: processes.world_size()]
            options.device = options.device or processes.take_device()
            names = ("model_path", "model_base", "device", "cache_dir", "model_max_length", "video_dir")
            answerer = Answerer(**{name: getattr(options, name) for name in names})
            with strategy.prune(answerer.model, config) as record:
                failed = answer_all(answerer, mine, answers, options.batch_size, options.strict)
            if processes.rank():
                answers.close()
            everyone = collectives.gather([astuple(item) for item in failed])
            failed = [LeftOut(*item) for part in everyone for item in part]
            record = record.reduce_over_ranks()
            if processes.rank():
                return 0
            answers.take_in()
            order = {sample.key: number for number, sample in enumerate(chunked)}
            # What the files themselves leave out is told once, by the first chunk.
            listed = left_out if options.chunk_idx == 0 else []
            listed = listed + sorted(failed, key=lambda item: order[str(item.id)])
            answers.finish(chunked, listed)
        finally:
            answers.close()
    except ValueError as error:
        sys.exit(f"run_inference_video_qa: {error}")
    print(record.summary())
    merged = merge(folder, options.output_name, options.num_chunks) if options.num_chunks > 1 else answers.file
    print(f"{len(answers.done)} answers in {answers.file}" + (f", all chunks in {merged}" if merged else ""))
    for item in listed:
        print(f"left out: {item.id} {item.video}: {item.reason}", file=sys.stderr)
    if listed:
        print(f"{len(listed)} left out, listed in {answers.left_out_file}", file=sys.stderr)
    return INCOMPLETE if listed else 0


if __name__ == "__main__":
    sys.exit(main())
