"""The lmms-eval model `llava_vtr`: LLaVA-1.5, pruned by any strategy."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

import strategy
from llava.conversation import conv_templates
from llava.mm_utils import pad_left, place_pictures, prepare_pictures, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model, num_template_tokens, weight_folders
from strategy.config import field_names
from strategy.distributed import processes, tensor_parallel, zero
from strategy.evaluation.ahead import DEFAULT_WORKERS, prepare_ahead, prepare_batches
from strategy.evaluation.batch_size import BatchSize, take_batch_size
from strategy.evaluation.lmms_model import PrunedModelMixin
from strategy.evaluation.special_tokens import as_text
from strategy.evaluation.visuals import Unreadable
from strategy.options import at_least, check_names, count, flag

# What `--model_args` may hold besides the pruning options, with the defaults.
ARGUMENTS: dict[str, Any] = {
    "pretrained": "liuhaotian/llava-v1.5-7b",
    "device": None,
    "device_map": None,
    "dtype": None,
    "batch_size": 1,
    "max_batch_size": None,
    "attn_implementation": "sdpa",
    "use_flash_attention_2": False,
    "conv_template": "vicuna_v1",
    "tensor_parallel": 1,
    "zero_stage": 0,
    "prepare_ahead": DEFAULT_WORKERS,
    "resume_folder": None,
    "downsample": None,
    "model_name": None,
    "truncation": True,
    "truncate_context": False,
    "tie_weights": True,
    "use_cache": True,
}
# Those that lmms-eval's own LLaVA takes too, and that change no answer here or there.
WITHOUT_EFFECT = ("model_name", "truncation", "truncate_context", "tie_weights", "use_cache")
DTYPES = {None: None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GENERATION = ("max_new_tokens", "temperature", "top_p", "num_beams")


class Prepared(NamedTuple):
    """A question with the token ids of its prompt [S], its prepared pictures, and the generation's arguments."""

    ids: Tensor
    pictures: list[Tensor]
    arguments: dict[str, Any]


class Batch(NamedTuple):
    """Questions that are ready to be answered together.

    ids, mask: the prompts, padded on the left [B, S]. pictures: all of theirs. arguments: those of the generation.
    """

    ids: Tensor
    mask: Tensor
    pictures: list[Tensor]
    arguments: dict[str, Any]


class Choice(NamedTuple):
    """A choice that is ready to be scored: the token ids of its prompt [S], its own [L], and the prepared pictures."""

    prompt: Tensor
    continuation: Tensor
    pictures: list[Tensor]


class Loss(tuple[float, bool], GenerationResult):
    """A loss and whether the continuation is greedy, in a form that lmms-eval hands on as it is.

    lmms-eval 0.7.3 turns what is no `GenerationResult` into text, which its scores of `multiple_choice` cannot read.
    """

    def __init__(self, answer: tuple[float, bool]) -> None:
        GenerationResult.__init__(self, text=self)

    def strip(self) -> str:
        """Return nothing, so that lmms-eval's cache does not keep this answer; it would come back as text."""
        return ""


def resolve_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that matter, with defaults for those not given.

    Args:
        given: Those of ARGUMENTS that were typed.

    Raises:
        ValueError: One is unknown, is no flag though it should be, or contradicts another one.
    """
    check_names(given, (*ARGUMENTS, *field_names()))
    options = ARGUMENTS | given
    for name in WITHOUT_EFFECT:
        if isinstance(ARGUMENTS[name], bool):
            flag(name, options[name])
        del options[name]
    if flag("use_flash_attention_2", options.pop("use_flash_attention_2")):
        if (other := given.get("attn_implementation", "flash_attention_2")) != "flash_attention_2":
            raise ValueError(f"use_flash_attention_2=True and attn_implementation={other}: give one of the two")
        options["attn_implementation"] = "flash_attention_2"
    place, device = options["device_map"], options["device"]
    if isinstance(place, str) and place not in processes.PLACEMENTS:
        try:
            processes.find_device(place)
        except ValueError as error:
            raise ValueError(
                f"device_map={place!r}: allowed are {', '.join(processes.PLACEMENTS)} and a device; {error}"
            ) from None
        if device not in (None, place):
            raise ValueError(f"device={device} and device_map={place}: give one of the two")
        options |= {"device": place, "device_map": None}
    return options


class LlavaVTR(PrunedModelMixin, lmms):
    """LLaVA-1.5 with visual token pruning.

    Args:
        arguments: ARGUMENTS, and the options of `strategy.VTRConfig`, these also with `vtr_` in front.

    Raises:
        SystemExit: An argument or the checkpoint is wrong; the message is one sentence.
    """

    model_id = "llava_vtr"

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        try:
            config = strategy.VTRConfig.take(arguments)
            options = resolve_arguments(arguments)
            if options["conv_template"] not in list(conv_templates):
                raise ValueError(f"conv_template={options['conv_template']!r}: allowed are {', '.join(conv_templates)}")
            if options["dtype"] not in list(DTYPES):
                raise ValueError(f"dtype={options['dtype']!r}: allowed are {', '.join(filter(None, DTYPES))}")
            self.template = conv_templates[options["conv_template"]]
            batch_size, most = take_batch_size(options)
            self.workers = at_least(0)("prepare_ahead", options["prepare_ahead"])
            tp_size = tensor_parallel.parse_tp_size(options["tensor_parallel"])
            sharded = zero.parse_zero_stage(options["zero_stage"], tp_size)
            processes.rank_timeout()
            journal = self.open_journal(config, options, tp_size, weight_folders(str(options["pretrained"])))
            place, dtype = options["device"] or processes.take_device(), DTYPES[options["dtype"]]
            device_map = options["device_map"] if processes.world_size() == 1 else None
            if tp_size > 1 or sharded:  # the whole model may be too large for a GPU
                place, dtype = "cpu", dtype or (None if processes.take_device() == "cpu" else torch.float16)
            self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
                str(options["pretrained"]),  # of which lmms-eval may have made a number
                device_map=device_map,
                device=place,
                dtype=dtype,
                attn_implementation=options["attn_implementation"],
            )
            if options["downsample"] is not None:
                self.model.get_vision_tower().downsample(count("downsample", options["downsample"]))
            self.model.num_template_tokens = num_template_tokens(self.tokenizer, self.template)
            self.distribute_and_attach(self.model, self.model.get_decoder(), config, tp_size, sharded, journal)
            self.batches = BatchSize.for_model(self.model, self.tp_group, batch_size, most, self.log)
            self.device = self.model.device
        except (ValueError, OSError) as error:
            # lmms-eval would print a traceback of its own around the sentence.
            raise SystemExit(f"{self.model_id}: {error}") from None

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request, in order; a request that cannot be answered is logged and gets an empty answer."""
        return self.answer_requests(requests, self._generate_all, "")

    def _generate_all(self, requests: list[Instance]) -> list[str]:
        # Requests with the same generation arguments share a batch, long prompts first.
        collator = Collator(
            [request.args for request in requests], lambda args: (-len(args[0]), args[0]), grouping=True
        )
        answers: list[str] = []
        chunks = collator.get_batched(n=self.batch_size)
        with (
            tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar,
            closing(prepare_batches(self._prepare, chunks, _joined, self.workers)) as batches,
        ):
            for batch in batches:
                answers += self._generate(batch)
                bar.update(len(batch.ids))
        return collator.get_original(answers)

    def _prepare(self, request: tuple[Any, ...]) -> Prepared:
        """Read and prepare the prompt and pictures of a request, given by its arguments; any thread may do that."""
        context, arguments, doc_to_visual, doc_id, task, split = request
        pictures = doc_to_visual(self.task_dict[task][split][doc_id])
        return Prepared(self._tokenize(context, len(pictures), None), self._prepared(pictures), arguments)

    def as_seen(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the part of each picture that the grid of its tokens covers."""
        processor = self.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = process_images(list(pictures), processor, self.model.config)
        return [to_pil_image((picture * std + mean).clamp(0, 1)) for picture in pixels]

    def loglikelihood(self, requests: list[Instance]) -> list["Loss"]:
        """Return for each request the loss of its continuation, and whether the continuation is greedy.

        The loss is the mean negative log-likelihood of a token, as lmms-eval's own models return it, which takes the
        smallest number for the best. The prompt alone is prefilled and pruned, as in generation; the continuation
        follows on the cache. A request that cannot be answered is logged, and its loss is infinite: of choices that all
        have such a loss, the first wins.
        """
        one_by_one = BatchSize(self.batch_size)  # whose memory says nothing about batches
        answers = self.answer_requests(requests, self._score_all, (float("inf"), False), one_by_one)
        return [Loss(answer) for answer in answers]

    def _score_all(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        with closing(prepare_ahead(self._prepare_choice, requests, self.workers)) as choices:
            bar = tqdm(choices, total=len(requests), desc="Model Responding", disable=self.rank != 0)
            return [self._score(choice) if choice else (float("inf"), False) for choice in bar]

    def _prepare_choice(self, request: Instance) -> Choice | None:
        """Read and prepare what a request asks to be scored; return None if its document is unreadable."""
        context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        pictures = doc_to_visual(document)
        if isinstance(document, Unreadable):
            return None
        target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(document)
        prompt = self._tokenize(context, len(pictures), None)
        # Tasks begin a choice with a space, and the template has one already.
        continuation = self._tokenize(context, len(pictures), target.lstrip())[len(prompt) :]
        if not len(continuation):
            raise ValueError("nothing to score, the target is empty")
        return Choice(prompt, continuation, self._prepared(pictures))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise NotImplementedError, since LLaVA-1.5 is evaluated in single turns."""
        raise NotImplementedError("llava_vtr answers single questions; tasks of several rounds are not supported")

    def _tokenize(self, context: str, pictures: int, answer: str | None) -> Tensor:
        context = place_pictures(as_text(context, self.tokenizer.all_special_tokens), pictures)
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], context)
        conversation.append_message(conversation.roles[1], answer)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")

    def _prepared(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        return prepare_pictures(pictures, self.image_processor, self.model.config, self.model.device)

    def _generate(self, batch: Batch) -> list[str]:
        arguments = dict(batch.arguments)
        until = arguments.pop("until", [])
        # Where a task names no stop, lmms-eval names a blank line, which would cut an answer of several paragraphs.
        stops = [stop for stop in ([until] if isinstance(until, str) else until or []) if stop and stop != "\n\n"]
        options = {name: arguments[name] for name in GENERATION if arguments.get(name) is not None}
        # Tasks write greedy decoding as a temperature of 0, and some sample without naming one.
        temperature = options.pop("temperature", 1.0 if arguments.get("do_sample") else 0)
        sample = temperature > 0 and arguments.get("do_sample", True)
        if sample:
            options["temperature"] = temperature
        else:
            options.pop("top_p", None)
        new = self.model.generate(
            batch.ids,
            images=batch.pictures,
            attention_mask=batch.mask,
            do_sample=sample,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            **{"max_new_tokens": 1024} | options,
        )
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return [text.strip() for text in texts]

    @torch.no_grad()
    def _score(self, choice: Choice) -> tuple[float, bool]:
        prompt, continuation = choice.prompt.to(self.model.device), choice.continuation.to(self.model.device)
        embeddings, mask, layout = self.model.embed_prompts(prompt[None], None, choice.pictures)
        cache = DynamicCache()
        first = self.model(
            inputs_embeds=embeddings, attention_mask=mask, visual_layout=layout, past_key_values=cache, use_cache=True
        )
        mask = torch.cat([mask, mask.new_ones(1, len(continuation) - 1)], dim=1)
        logits = first.logits[:, -1:]
        if len(continuation) > 1:
            later = self.model(
                input_ids=continuation[None, :-1], attention_mask=mask, past_key_values=cache, use_cache=True
            )
            logits = torch.cat([logits, later.logits], dim=1)
        loss = torch.nn.functional.cross_entropy(logits[0], continuation)
        return float(loss), bool((logits[0].argmax(-1) == continuation).all())


def _joined(questions: Sequence[Prepared]) -> Batch:
    """Return prepared questions, whose generation has the same arguments, as a batch."""
    pictures = [picture for question in questions for picture in question.pictures]
    ids, mask = pad_left([question.ids for question in questions])
    return Batch(ids, mask, pictures, questions[0].arguments)
