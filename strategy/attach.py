"""Attach a strategy to a model, and detach it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from strategy import registry
from strategy.backbone import Backbone, Layout, find_backbone
from strategy.base import Strategy
from strategy.config import VTRConfig
from strategy.graph.fallback import STOCK_LOOP, wants_graphs
from strategy.graph.generator import GraphGenerator
from strategy.kernels.layer_check import Trial, try_layers
from strategy.kernels.layer_facts import is_zero_sharded, tp_group_of
from strategy.kernels.llama_layer import fusion_blocker, lies_apart
from strategy.metrics.meter import CostMeter
from strategy.metrics.record import RunRecord
from strategy.plan import Plan
from strategy.pruning import refusals
from strategy.pruning.encoder import EncoderRecorder
from strategy.pruning.hooks import PruningHooks
from strategy.pruning.joint import JointPlacer
from strategy.pruning.patch import ModelPatch
from strategy.pruning.question_free import QuestionFreePass
from strategy.pruning.stage import StageRunner, Watch

ATTRIBUTE = "_vtr_attachment"  # where a model and its decoder keep their attachment


class Attachment:
    """What is put on one model: hooks, and the graph engine where it is wanted.

    Args:
        model: The model, or its bare decoder.
        decoder: The decoder.
        backbone: Their family.
        config: The configuration.
        layout: The layout of a bare decoder's prompts.
        watch: See `attach`.

    Raises:
        ValueError: As `attach` raises it; then nothing is left on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Any,
        backbone: Backbone,
        config: VTRConfig,
        layout: Layout | None,
        watch: Watch | None,
    ) -> None:
        self.model, self.decoder = model, decoder
        strategy, plan = _planned(config, backbone, decoder)
        described, layers = backbone.layer_specs(decoder), decoder.layers
        reasons = {
            "a bare decoder does not generate": model is decoder,
            "watch= sees stock layers only": watch is not None,
        }
        stock_loop = next((reason for reason, applies in reasons.items() if applies), None)
        fuses = config.engine != "eager" and stock_loop is None
        blocker = (fusion_blocker(layers, described) or lies_apart(model)) if fuses else None
        fused = fuses and not blocker
        # Of an unpruned model that the stock loop runs, nothing is computed by a description.
        tried = plan is not None or fused
        specs, difference = try_layers(decoder, described, backbone, fused) if tried else Trial(tuple(described))
        blocker = blocker or difference
        if blocker and config.engine == "graph":
            raise ValueError(f"engine=graph: {blocker} cannot be fused; allowed here are engine=eager and engine=auto")
        self.record = RunRecord(config.strategy if config.enabled else "unpruned", len(layers), plan)
        self.meter = CostMeter(self.record, layers, specs, backbone.experts(decoder))
        runner = StageRunner(strategy, plan, self.meter, tp_group_of(layers), watch)
        question_free = None
        if strategy and plan and strategy.question_free:
            sharded = is_zero_sharded(layers)
            question_free = QuestionFreePass(decoder, plan.layers[0], self.meter, config.strategy, sharded)
        layer = strategy.encoder_layer if strategy else None
        encoder = EncoderRecorder.of(layer, config.strategy, model, backbone, bare=model is decoder)
        joint = JointPlacer.of(strategy, model, backbone, self.meter)
        hooks = PruningHooks(model, decoder, backbone, specs, layout, runner, question_free, encoder, joint)
        self.generator: GraphGenerator | None = None
        if stock_loop and wants_graphs(config.engine, decoder):
            self.record.decide("answer", "stock loop", stock_loop)
            warnings.warn(STOCK_LOOP.format(config.engine, stock_loop), stacklevel=3)
        if fuses:
            self.generator = GraphGenerator(model, decoder, backbone, config.engine, blocker, hooks)
        self.patch = ModelPatch()
        self._install(hooks, backbone)

    def _install(self, hooks: PruningHooks, backbone: Backbone) -> None:
        whole: Any = None if self.model is self.decoder else self.model
        entry = self.decoder if whole is None else backbone.entry(whole)
        bucket = self.generator.bucket_prompts if self.generator else None
        hooks.register(self.patch, entry, bucket)
        self.patch.handles += backbone.extra_hooks(self.decoder)
        if whole is not None:
            vision, head = backbone.vision(whole), whole.get_output_embeddings()
            self.patch.handles += self.meter.hooks(vision, head, backbone.pieces)
        if self.generator is not None:
            self.generator.install(self.patch)
        if whole is not None and self.record.plan:
            self.patch.handles.append(whole.register_forward_pre_hook(refusals.refuse_loss, with_kwargs=True))
            if hasattr(whole, "generate"):
                self.patch.replace(whole, "generate", partial(refusals.generate, whole, whole.generate))
                if hooks.encoder is not None:
                    self.patch.replace(whole, "generate", partial(hooks.encoder.generate, whole.generate))
        if whole is not None:
            hooks.generate_call.install(self.patch, whole, entry)

    def remove(self) -> None:
        """Take everything off the model."""
        self.meter.close()
        self.patch.remove()
        for module in {self.model, self.decoder}:
            if hasattr(module, ATTRIBUTE):
                delattr(module, ATTRIBUTE)
        # This comes last, since it needs memory, which may be lacking.
        if self.generator is not None:
            self.generator.free()


def _planned(config: VTRConfig, backbone: Backbone, decoder: Any) -> tuple[Strategy | None, Plan | None]:
    """Return the strategy and its plan for a decoder; None for an unpruned model."""
    if not config.enabled:
        return None, None
    cls = registry.get(config.strategy)
    if not issubclass(cls, Strategy):
        raise ValueError(f"{config.strategy}: {cls.__qualname__} is registered, but it is no strategy.Strategy")
    strategy = cls(config)
    plan: Any = strategy.plan(backbone.facts(decoder))
    if not isinstance(plan, Plan):
        raise ValueError(f"{config.strategy}: plan() returned {plan!r}, want a Plan, as `Plan.resolve` makes it")
    if strategy.question_free and plan.layers[0] == 0:
        raise ValueError(f"{config.strategy} reads prompts without their questions first: prune at layer 1 or later")
    return strategy, plan


def attach(
    model: nn.Module,
    config: VTRConfig,
    backbone: str | None = None,
    layout: Layout | None = None,
    watch: Watch | None = None,
) -> RunRecord:
    """Prune a model from now on, and return the record of what happens.

    Args:
        model: A model of a known backbone; or its bare text decoder, with `layout`.
        config: What to prune, where, and how much.
        backbone: The family, where the class of a bare decoder belongs to several.
        layout: For each sample of a bare decoder's prompts, a list of (start, (T, H, W)), see `Span`.
        watch: Is called at each stage for each group of samples alike, with their view, their scores [G, N] and the
            kept tokens [G, K]; what it does is not counted. The scores are None where a strategy selects without.

    Raises:
        ValueError: The model is unknown or attached already, or the configuration does not fit the decoder.
    """
    family = find_backbone(model, backbone)
    bare = isinstance(model, family.decoders)
    if bare and layout is None:
        raise ValueError(f"a bare {type(model).__name__} does not show where its visual tokens lie: give layout=")
    decoder = model if bare else family.decoder(model)
    if hasattr(decoder, ATTRIBUTE):
        raise ValueError(f"this {type(model).__name__} is being pruned already: detach it first")
    attachment = Attachment(model, decoder, family, config, layout, watch)
    for module in (model, decoder):
        setattr(module, ATTRIBUTE, attachment)
    return attachment.record


def attachment_of(model: nn.Module) -> Attachment:
    """Return what is attached to a model or decoder; ValueError if nothing is."""
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    if attachment is None:
        raise ValueError(f"this {type(model).__name__} is not being pruned")
    return attachment


def leave_lack_of_memory(model: nn.Module, caller_splits: Callable[[], bool]) -> None:
    """Leave a lack of memory to the caller of `generate` where the stock loop would answer from then on.

    Args:
        model: An attached model.
        caller_splits: Returns whether the caller would ask fewer prompts at a time.
    """
    generator = attachment_of(model).generator
    if generator is not None:
        generator.policy.caller_splits = caller_splits


def detach(model: nn.Module) -> None:
    """Stop pruning a model; ValueError for a model that is not attached."""
    attachment = attachment_of(model)
    if attachment.model is not model:
        raise ValueError(f"this {type(model).__name__} is not being pruned")
    attachment.remove()


@contextmanager
def prune(
    model: nn.Module,
    config: VTRConfig,
    backbone: str | None = None,
    layout: Layout | None = None,
    watch: Watch | None = None,
) -> Iterator[RunRecord]:
    """Prune a model inside a `with`; arguments and errors are those of `attach`."""
    record = attach(model, config, backbone, layout, watch)
    try:
        yield record
    finally:
        detach(model)
