"""Mixins that add pruning to lmms-eval's own wrappers."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils import gen_metrics
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import strategy
from qwen_vl_vtr.arguments import choose_devices, read_arguments
from qwen_vl_vtr.checkpoint import CONFIG_ERRORS, Rename, check_checkpoint
from qwen_vl_vtr.colours import keep_bytes
from qwen_vl_vtr.stock_loop import StockLoop
from qwen_vl_vtr.videos import VideoFiles
from strategy.backbone import find_backbone
from strategy.config import field_names
from strategy.distributed import processes, tensor_parallel, zero
from strategy.evaluation.ahead import DEFAULT_WORKERS
from strategy.evaluation.batch_size import LARGEST, BatchSize, take_batch_size
from strategy.evaluation.checkpoint_files import find_folder
from strategy.evaluation.downsampling import nearest_grid
from strategy.evaluation.lmms_model import PrunedModelMixin
from strategy.evaluation.pictures import to_rgb
from strategy.evaluation.special_tokens import as_text
from strategy.evaluation.turns import take_turns
from strategy.options import Read, at_least, check_names, count, flag

IMAGE_MARK = "<image>"
OWN_ARGUMENTS = ("max_batch_size", "tensor_parallel", "zero_stage", "prepare_ahead", "resume_folder", "downsample")
FEWEST_TOKENS = 4  # qwen_vl_utils enlarges pictures of fewer
MAX_ASPECT = 200  # the ratio of a picture's sides up to which the image processors of all Qwen-VL take it


class PrunedWrapper(PrunedModelMixin, lmms):
    """A mixin: list it before one of lmms-eval's wrappers among the bases of a class.

    Args:
        arguments: Those of the wrapper; OWN_ARGUMENTS; and the options of `strategy.VTRConfig`, these also with
            `vtr_` in front. The default device is CUDA if there is one, otherwise the CPU, where the model runs in
            float32.

    Attributes:
        model_classes: The classes that transformers has for the family's models, by the `model_type` of a checkpoint.
        transposed, rename: As for `check_checkpoint`.
        catches_errors: Whether the wrapper answers with an empty text if `generate` fails, and goes on.
        sorts_messages: Whether the wrapper of a chat model sorts its requests.
        largest_batch: How many questions the wrapper can answer at a time, as far as `batch_size=auto` goes.
        readers: The reader of each argument that the wrapper takes as it comes.

    Raises:
        SystemExit: An argument or the checkpoint is wrong; the message is one sentence.
    """

    model_classes: ClassVar[Mapping[str, Any]]
    transposed: tuple[str, ...] = ()
    rename: ClassVar[Rename | None] = None
    catches_errors = False
    sorts_messages = True
    largest_batch = LARGEST
    _error: Exception | None = None
    readers: ClassVar[Mapping[str, Read]]

    def __init__(self, **arguments: Any) -> None:
        pretrained = arguments.get("pretrained", "the default checkpoint")
        try:
            config = strategy.VTRConfig.take(arguments)
            defaults = self._defaults()
            check_names(arguments, (*defaults, *OWN_ARGUMENTS, *field_names()))
            arguments = read_arguments(arguments, defaults, self.readers)
            if "trust_remote_code" in defaults:
                if flag("trust_remote_code", arguments.get("trust_remote_code", False)):
                    raise ValueError("trust_remote_code=True: code of checkpoints is not run; leave it out")
                arguments["trust_remote_code"] = False
            tp_size = tensor_parallel.parse_tp_size(arguments.pop("tensor_parallel", 1))
            sharded = zero.parse_zero_stage(arguments.pop("zero_stage", 0), tp_size)
            batch_size, most = take_batch_size(arguments)
            workers = at_least(0)("prepare_ahead", arguments.pop("prepare_ahead", DEFAULT_WORKERS))
            processes.rank_timeout()
            pretrained = arguments.get("pretrained", defaults["pretrained"])
            folder = find_folder(pretrained)
            journal = self.open_journal(config, arguments, tp_size, [folder])
            arguments.pop("resume_folder", None)
            if (tokens := arguments.pop("downsample", None)) is not None:
                arguments |= self.start_downsampling(count("downsample", tokens), defaults | arguments)
            place = processes.take_device()
            if tp_size > 1 or sharded:
                # The whole model may be too large for a GPU.
                arguments |= {"device": place, "device_map": "cpu"}
            else:
                devices = choose_devices(arguments.get("device"), arguments.get("device_map"), place)
                arguments["device"], arguments["device_map"] = devices
            model_class = check_checkpoint(folder, self.model_classes, self.transposed, type(self).rename)
            arguments["pretrained"] = str(self.folder_for_wrapper(folder, model_class))
            with single_process():
                super().__init__(**arguments)
            if type(self.model) is not model_class:
                raise ValueError(f"{pretrained}: lmms-eval loads it as {type(self.model).__name__}, and it is another")
            # Answers follow the prompt, so padding comes before it; the wrappers leave the side to the checkpoint.
            self.tokenizer.padding_side = self.processor.tokenizer.padding_side = "left"
            if self.device.type == "cpu":
                # The wrappers load half precision, which most CPUs only emulate.
                self.model.float()
            decoder = find_backbone(self.model).decoder(self.model)
            self.distribute_and_attach(self.model, decoder, config, tp_size, sharded, journal)
            self.batches = BatchSize.for_model(
                self.model, self.tp_group, batch_size, min(most, self.largest_batch), self.log
            )
            if self.catches_errors:
                self.model.generate = partial(self._generate, self.model.generate)
            self.workers, self._video_files, self._stock_loop = workers, VideoFiles(), StockLoop(self)
        except (ValueError, OSError, ImportError) as error:
            # lmms-eval would print a traceback of its own around the sentence.
            raise SystemExit(f"{self.model_id}: {_reason(error, arguments, pretrained)}") from None
        except torch.cuda.OutOfMemoryError:
            raise
        except (SafetensorError, UnpicklingError, RuntimeError, *CONFIG_ERRORS) as error:
            reason = _reason(error, arguments, pretrained)
            raise SystemExit(f"{self.model_id}: {pretrained}: broken weights or configuration ({reason})") from None

    def start_downsampling(self, tokens: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Have pictures resized to about so many tokens of 576, and return the wrapper's arguments that this needs.

        Raises:
            ValueError: The number of tokens does not follow from a picture's size.
        """
        raise ValueError(f"downsample={tokens}: {self.model_id} cannot resize pictures to that: leave it out")

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Return the defaults of the wrapper's arguments, also of those that it hands on to the wrapper it extends."""
        defaults: dict[str, Any] = {}
        for kind in cls.__mro__:
            if "__init__" in vars(kind) and not issubclass(kind, PrunedWrapper) and kind is not object:
                parameters = list(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]
                named = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
                defaults = named | defaults
        return defaults

    def _generate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate`, and remember its error, which the wrapper only logs."""
        try:
            return stock(*args, **kwargs)
        except Exception as error:
            self._error = error
            raise

    def folder_for_wrapper(self, folder: Path, model_class: Any) -> Path:
        """Return the path by which the wrapper loads a checkpoint as a model of the given class."""
        return folder

    def as_seen(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the part of each picture that the grid of its tokens covers, which is all of it."""
        return [self.prepare_picture(to_rgb(picture)) for picture in pictures]

    def prepare_text(self, text: str) -> str:
        return as_text(text, self._special_tokens)

    def prepare_video(self, file: Path) -> str:
        return self._video_files.readable(file, self.readable_frames)

    def readable_frames(self, count: int) -> int:
        """Return how many frames a video must have so that the wrapper can read it, given that it has `count`."""
        return max(count, 2)

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answer each request, in order; a request that cannot be answered is logged and gets an empty answer."""
        return self.answer_requests(requests, self._answer_by_task, "")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """Answer tasks of several rounds as the wrapper does: each rank by itself, and without the journal.

        Raises:
            SystemExit: The ranks share a model or its weights, or there is a journal.
        """
        if self.tp_group or self.shards or self.journal:
            raise SystemExit(
                f"{self.model_id}: tasks of several rounds do not go with tensor_parallel, zero_stage or resume_folder"
            )
        return super().generate_until_multi_round(requests)

    def _answer_by_task(self, requests: list[Instance]) -> list[Any]:
        # The wrappers answer a whole batch as questions of the first request's task.
        indices_by_task: dict[tuple[str, str], list[int]] = {}
        for index, request in enumerate(requests):
            indices_by_task.setdefault(tuple(request.args[-2:]), []).append(index)
        parts = list(indices_by_task.values())
        if self.workers:
            parts = [batch for indices in parts for batch in self._batches(requests, indices)]
        asked = ([requests[index] for index in part] for part in parts)
        if self.workers:
            answered = take_turns(self._stock_loop, asked, self.workers)
        else:
            answered = (self.answer_as_stock(own) for own in asked)
        bar = tqdm(total=len(requests), desc="Model Responding", disable=not self.workers or self.rank != 0)
        answers: list[Any] = [""] * len(requests)
        with bar, quiet_metrics(), closing(answered):
            for part in parts:
                own = next(answered)
                if (error := self._error) is not None:
                    self._error = None
                    raise error
                for index, answer in zip(part, own, strict=True):
                    answers[index] = answer
                bar.update(len(part))
        return answers

    def answer_as_stock(self, requests: list[Instance]) -> list[Any]:
        """Answer requests of one task as the wrapper does."""
        own: list[Any] = super().generate_until(requests)
        return own

    def _batches(self, requests: list[Instance], indices: list[int]) -> Iterator[list[int]]:
        """Yield the batches that the wrapper makes of the requests of a task, by number, in its order."""
        place = 1 if self.is_simple else 2  # of the generation arguments

        def order(index: int) -> Any:
            text = requests[index].args[0]
            if self.is_simple:
                return -len(self.tokenizer.encode(text)), text
            return text if self.sorts_messages else 0

        collator = Collator(indices, order, lambda index: requests[index].args[place], grouping=True)
        yield from collator.get_batched(n=self.batch_size)


class PrunedQwen(PrunedWrapper):
    """A mixin for the wrappers of the Qwen models."""

    _downsample: Callable[[Image.Image], Image.Image] | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        keep_bytes(self.processor)

    def start_downsampling(self, tokens: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        low, high = arguments["min_pixels"], arguments["max_pixels"]

        def downsample(picture: Image.Image) -> Image.Image:
            processor = self.processor.image_processor
            cell = processor.patch_size * processor.merge_size
            stock = smart_resize(picture.height, picture.width, cell, low, high)
            share = tokens / find_backbone(self.model).nominal_tokens
            wanted = max(FEWEST_TOKENS, stock[0] * stock[1] / cell**2 * share)
            rows, columns = nearest_grid(wanted, picture.height / picture.width)
            return picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)

        self._downsample = downsample
        return {"min_pixels": 1}  # otherwise the processor enlarges the pictures again

    def prepare_text(self, text: str) -> str:
        # The wrappers of simple models remove these marks, and what is left may spell a special token.
        while self.is_simple and IMAGE_MARK in text:
            text = text.replace(IMAGE_MARK, "")
        return super().prepare_text(text)

    def prepare_picture(self, picture: Image.Image) -> Image.Image:
        long, short = max(picture.size), min(picture.size)
        if long > MAX_ASPECT * short:
            # The image processor refuses such a picture, and would show it in one row of patches.
            wide = math.ceil(long / MAX_ASPECT)
            picture = picture.resize((max(picture.width, wide), max(picture.height, wide)))
        return self._downsample(picture) if self._downsample else picture

    def prepare_video(self, file: Path) -> str:
        if self._downsample:
            raise ValueError(f"{file} is a video, and downsample= resizes pictures only")
        return super().prepare_video(file)

    def check_prompt(self, text: str, visuals: int) -> None:
        if not (self.interleave_visuals and self.is_simple):
            return
        places = {int(number) for number in re.findall(r"<image (\d+)>", text)} & set(range(1, visuals + 1))
        if not places:
            raise ValueError(
                f"none of its {visuals} visuals is in the prompt: with interleave_visuals=True a question has to say "
                "<image 1> where the first one belongs"
            )
        if len(places) < visuals:
            self.log("WARNING", f"{text[:60]!r} has a place <image N> for only {len(places)} of its {visuals} visuals")


@contextmanager
def quiet_metrics() -> Iterator[None]:
    """Keep lmms-eval from logging what each batch took."""
    logger.disable(gen_metrics.__name__)
    try:
        yield
    finally:
        logger.enable(gen_metrics.__name__)


@contextmanager
def single_process() -> Iterator[None]:
    """Make lmms-eval's wrappers see one process only.

    With several processes, all that a wrapper does is to choose a GPU and to refuse a machine without one; the argument
    `device` has made that choice.
    """
    state = PartialState()
    count, state.num_processes = state.num_processes, 1
    try:
        yield
    finally:
        state.num_processes = count


def _reason(error: Exception, arguments: Mapping[str, Any], pretrained: Any) -> str:
    """Return an error's message on one line, with the checkpoint under the name that was given for it."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words.replace(str(arguments.get("pretrained", pretrained)), str(pretrained))
