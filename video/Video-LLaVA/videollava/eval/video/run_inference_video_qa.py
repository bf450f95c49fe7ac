"""Answer the questions of a zero-shot video question answering benchmark with Video-LLaVA, pruned or not."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import strategy
from llava.mm_utils import pad_left
from strategy.config import ALIASES, describe_options, strategy_options
from strategy.distributed import collectives, processes, watchdog
from strategy.evaluation.ahead import DEFAULT_WORKERS, prepare_batches
from strategy.evaluation.lmms_model import IGNORED_ON_RESUME, what_answers_depend_on
from strategy.evaluation.questions import concerns_the_model
from strategy.evaluation.special_tokens import as_text
from strategy.evaluation.visuals import one_line
from strategy.kernels.transfers import pinned
from videollava.constants import IMAGE_TOKEN_INDEX
from videollava.conversation import conv_templates
from videollava.eval.video.answers import AnswerFile, chunk_name, merge, rank_name
from videollava.eval.video.matching import matches
from videollava.eval.video.questions import LeftOut, Sample, chunk, find_video, read_samples
from videollava.mm_utils import load_video, prepare_prompt, prepare_video, tokenizer_image_token
from videollava.model.builder import load_pretrained_model, weight_folders

TEMPLATE = "llava_v1"
MAX_NEW_TOKENS = 1024
INCOMPLETE = 3  # exit status of a run that left something out

Prepared = tuple[Tensor, Tensor]
"""The token ids [L] and the video [3, T, side, side] of a question."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the pruning options that are not given are absent, but for `vtr_enabled`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--video_dir", required=True, help="folder of videos")
    data.add_argument("--gt_file_question", required=True, help="test_q.json: question_id, video_name, question")
    data.add_argument("--gt_file_answers", required=True, help="test_a.json: question_id, answer, type")
    data.add_argument("--num_samples", type=int, help="only the first so many questions; all if not given")
    data.add_argument("--num_chunks", type=int, default=1, help="parts the questions are split into")
    data.add_argument("--chunk_idx", type=int, default=0, help="the part to answer; the last to end joins them all")
    data.add_argument("--batch_size", type=int, default=1, help="questions answered at a time")
    data.add_argument(
        "--prepare_ahead",
        type=int,
        default=DEFAULT_WORKERS,
        help="threads that read and decode the next videos; 0: none",
    )
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
    _add_pruning_options(parser)
    options = parser.parse_args(arguments)
    for name, value in list(vars(options).items()):
        if isinstance(value, list) and len(value) == 1:
            setattr(options, name, value[0])
    return options


def _add_pruning_options(parser: argparse.ArgumentParser) -> None:
    """Add an argument for each option of `strategy.VTRConfig` and of the strategies."""
    group = parser.add_argument_group("pruning", f"Strategies are {', '.join(strategy.available())}.")
    users = strategy_options()
    for name, (default, sentence) in describe_options().items():
        text = sentence.replace("`", "").replace("%", "%%")
        if name in users:
            text += f" For {', '.join(users[name])}."
        value: Any = argparse.SUPPRESS
        if name == "enabled":
            value = False
        elif default is not None:
            text += f" (default: {default})"
        # A flag alone means True, but `--vtr_enabled False` must not.
        many: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(default, bool) else {"nargs": "+"}
        group.add_argument(f"--vtr_{name}", default=value, help=text, **many)
    for alias, name in ALIASES.items():
        group.add_argument(f"--vtr_{alias}", nargs="+", default=argparse.SUPPRESS, help=f"another name of --vtr_{name}")


def run_settings(options: argparse.Namespace, config: strategy.VTRConfig) -> dict[str, Any]:
    """Return what must not change between two runs that write the same file, by name."""
    names = ("model_path", "model_max_length", "num_samples", "num_chunks", "chunk_idx")
    files = {name: getattr(options, name) for name in ("gt_file_question", "gt_file_answers")}
    digests = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()}
    # The name of this module is not its own when it is run as a script.
    answering = what_answers_depend_on(AnswerFile.__module__, weight_folders(options.model_path, options.cache_dir))
    pruning = config.values() if config.enabled else {"enabled": False}
    pruning = {name: value for name, value in pruning.items() if name not in IGNORED_ON_RESUME}
    return {name: getattr(options, name) for name in names} | digests | answering | pruning


class Answerer:
    """A loaded model that answers questions about videos in a folder.

    Args:
        model_path, model_base, device, cache_dir, model_max_length, video_dir: As on the command line.

    Raises:
        ValueError: The checkpoint cannot be loaded; see `load_pretrained_model`.
    """

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

    def prepare(self, sample: Sample) -> Prepared:
        """Read and prepare a question; any thread may do that.

        Raises:
            ValueError: The video is missing, it cannot be decoded, or the prompt is too long.
        """
        tower = self.model.model.video_tower
        video = pinned(prepare_video(load_video(find_video(self.video_dir, sample.video)), tower.config.image_size))
        conversation = conv_templates[TEMPLATE].copy()
        question = as_text(sample.question, self.tokenizer.all_special_tokens)
        conversation.append_message(conversation.roles[0], prepare_prompt(question))
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, "pt")
        prompt = len(ids) + int((ids == IMAGE_TOKEN_INDEX).sum()) * tower.side**2
        if prompt >= self.limit:
            raise ValueError(f"the prompt has {prompt} tokens, --model_max_length allows {self.limit}")
        return ids, video

    def prepare_or_explain(self, sample: Sample) -> Prepared | ValueError:
        """Prepare a question, or return the error that prevents that.

        Raises:
            Exception: What concerns the model itself.
        """
        try:
            return self.prepare(sample)
        except Exception as error:
            return explained(error)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[Prepared]) -> list[str]:
        """Return the answers to prepared questions, as one batch."""
        prompts, videos = zip(*prepared, strict=True)
        ids, mask = pad_left(prompts)
        frames = (ids == IMAGE_TOKEN_INDEX).sum(1) * self.model.model.video_tower.side**2
        max_new = [min(MAX_NEW_TOKENS, self.limit - int(prompt)) for prompt in mask.sum(1) + frames]
        new = self.model.generate(
            ids,
            images=list(videos),
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(max_new),
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        rows = [row[:length] for row, length in zip(new, max_new, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def answer(self, prepared: Sequence[Prepared | ValueError]) -> list[str | ValueError]:
        """Return for each question its answer, or the error that prevents one.

        Args:
            prepared: The questions, as `prepare_or_explain` returns them.

        Raises:
            Exception: What concerns the model itself.
        """
        if len(prepared) == 1 and isinstance(prepared[0], ValueError):
            return [prepared[0]]
        ready = [each for each in prepared if not isinstance(each, ValueError)]
        if len(ready) == len(prepared):
            try:
                return list(self(ready))
            except Exception as error:
                failure = explained(error)
            if len(prepared) == 1:
                return [failure]
        # One by one, only the question that fails stays without an answer.
        return [self.answer([each])[0] for each in prepared]


def explained(error: Exception) -> ValueError:
    """Return an error about a question with its message in one line; raise it if it concerns the model itself."""
    if concerns_the_model(error):
        raise error
    return ValueError(one_line(error))


def answer_all(
    answerer: Answerer, waiting: list[Sample], answers: AnswerFile, batch_size: int, strict: bool, workers: int
) -> list[LeftOut]:
    """Answer questions, in order, and add the answers to a file that may hold others.

    Args:
        answerer: The model.
        waiting: The questions.
        answers: The file.
        batch_size: How many questions are answered at a time.
        strict: Whether the first question that cannot be answered ends the run.
        workers: How many threads prepare the questions of the next batches, see `prepare_batches`.

    Returns:
        What could not be answered.

    Raises:
        ValueError: A question cannot be answered, and `strict` is on.
    """
    left_out = []
    right, done = sum(matches(entry["pred"], entry["answer"]) for entry in answers.done.values()), len(answers.done)
    hidden = processes.rank() > 0
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    with (
        tqdm(total=done + len(waiting), initial=done, disable=hidden, desc="Answering", unit="question") as bar,
        closing(prepare_batches(answerer.prepare_or_explain, batches, list, workers)) as prepared,
    ):
        for batch in batches:
            watchdog.heartbeat()
            for sample, answer in zip(batch, answerer.answer(next(prepared)), strict=True):
                if isinstance(answer, str):
                    answers.add(sample, answer)
                    right += matches(answer, sample.answer)
                elif strict:
                    raise ValueError(f"question {sample.id}: {answer}") from answer
                else:
                    left_out.append(LeftOut(sample.id, sample.video, str(answer)))
            bar.set_postfix(accuracy=f"{right / max(1, len(answers.done)):.3f}", left_out=len(left_out), refresh=False)
            bar.update(len(batch))
    return left_out


def open_answers(folder: Path, name: str, settings: dict[str, Any]) -> tuple[AnswerFile, set[str]]:
    """Open the file that this rank writes; all ranks call it.

    Rank 0 first merges what the ranks of a run that was stopped have left, however many these were.

    Returns:
        The file, and the keys of the questions that are answered already.

    Raises:
        ValueError: As for `AnswerFile`.
    """
    if processes.rank():
        [done, *_] = collectives.gather(None)
        return AnswerFile(folder, rank_name(name, processes.rank()), settings), set(done)
    answers = AnswerFile(folder, name, settings)
    try:
        answers.merge_ranks()
    except ValueError:
        answers.close()
        raise
    [done, *_] = collectives.gather(list(answers.done))
    return answers, set(done)


def run(options: argparse.Namespace) -> tuple[AnswerFile, list[LeftOut], strategy.RunRecord] | None:
    """Answer the questions that the command line names, together with the other ranks.

    Returns:
        The file of answers, what was left out, and the run record of all ranks; None on ranks other than 0.

    Raises:
        ValueError: An argument, a file or the checkpoint is wrong, or with `--strict` something was left out.
    """
    processes.rank_timeout()
    config = strategy.VTRConfig.take(dict(vars(options)))
    samples, left_out = read_samples(options.gt_file_question, options.gt_file_answers)
    if left_out and options.strict:
        raise ValueError(f"{left_out[0].reason} (--strict)")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size}: allowed is a whole number from 1 up")
    if options.prepare_ahead < 0:
        raise ValueError(f"--prepare_ahead {options.prepare_ahead}: allowed is a whole number from 0 up")
    samples = chunk(samples[: options.num_samples], options.num_chunks, options.chunk_idx)
    name = chunk_name(options.output_name, options.num_chunks, options.chunk_idx)
    answers, done = open_answers(Path(options.output_dir), name, run_settings(options, config))
    try:
        waiting = [sample for sample in samples if sample.key not in done]
        options.device = options.device or processes.take_device()
        names = ("model_path", "model_base", "device", "cache_dir", "model_max_length", "video_dir")
        answerer = Answerer(**{name: getattr(options, name) for name in names})
        own = waiting[processes.rank() :: processes.world_size()]
        with strategy.prune(answerer.model, config) as record:
            failed = answer_all(answerer, own, answers, options.batch_size, options.strict, options.prepare_ahead)
        if processes.rank():
            answers.close()
        everyone = collectives.gather([astuple(item) for item in failed])
        record = record.reduce_over_ranks()
        if processes.rank():
            return None
        answers.merge_ranks()
        failed = [LeftOut(*item) for part in everyone for item in part]
        order = {sample.key: number for number, sample in enumerate(samples)}
        # Only the first chunk lists what the files themselves leave out.
        listed = left_out if options.chunk_idx == 0 else []
        listed = listed + sorted(failed, key=lambda item: order[str(item.id)])
        answers.finish(samples, listed)
    finally:
        answers.close()
    return answers, listed, record


def main() -> int:
    """Answer, print what was done, and return the exit status: 0, or INCOMPLETE if something was left out."""
    options = parse()
    try:
        result = run(options)
    except ValueError as error:
        sys.exit(f"run_inference_video_qa: {error}")
    if result is None:
        return 0
    answers, left_out, record = result
    print(record.summary())
    if decisions := record.graph_report():
        print(f"decisions of the graph engine:\n{decisions}")
    joined: Path | None = answers.file
    if options.num_chunks > 1:
        joined = merge(Path(options.output_dir), options.output_name, options.num_chunks)
    print(f"{len(answers.done)} answers in {answers.file}" + (f", all chunks in {joined}" if joined else ""))
    for item in left_out:
        print(f"left out: {item.id} {item.video}: {item.reason}", file=sys.stderr)
    if left_out:
        print(f"{len(left_out)} left out, listed in {answers.left_out_file}", file=sys.stderr)
    return INCOMPLETE if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
