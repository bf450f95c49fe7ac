"""When the stock loop answers in place of the graph engine, and what is left out when something fails."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from strategy.backbone import GreedyRequest
from strategy.distributed import processes
from strategy.distributed.watchdog import PassLostError
from strategy.graph.cuda_graphs import Report
from strategy.graph.static_cache import MAX_EOS_IDS
from strategy.kernels import kv_cache
from strategy.kernels.compile import compiling
from strategy.kernels.errors import first_line
from strategy.kernels.layer_facts import tp_group_of

STOCK_LOOP = "engine={}: answering with the eager engine, since {}"  # a warning, of the mode and the reason
OOM_REASON = "the GPU's memory is too small for graphs and their caches beside the model"


def recoverable_errors() -> tuple[type[Exception], ...]:
    """Return the errors after which the stock loop answers."""
    # Torch takes two seconds to import its compiler, which a process without graphs does not need.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # noqa: PLC0415

    return torch.cuda.OutOfMemoryError, TorchDynamoException, FailOnRecompileLimitHit


def wants_graphs(mode: str, decoder: Any) -> bool:
    """Return whether `VTRConfig.engine` asks for graphs on a decoder where it is."""
    return mode == "graph" or (mode == "auto" and next(decoder.parameters()).is_cuda)


class FallbackPolicy:
    """Decides who answers, and says so once for each reason.

    Args:
        model: The attached model.
        decoder: Its decoder.
        mode: `VTRConfig.engine`, auto or graph.
        blocker: Why the decoder's layers cannot be fused; None if they can.
        window: How many tokens the layer with the shortest window sees; None without windows.
        own_hooks: The object whose methods are this engine's hooks on the decoder's layers.
        report: Is called with each decision.

    Attributes:
        caller_splits: Returns whether the caller asks fewer prompts at a time after a lack of memory, which is then its
            own.
    """

    def __init__(
        self,
        model: Any,
        decoder: Any,
        mode: str,
        blocker: str | None,
        window: int | None,
        own_hooks: object,
        report: Report,
    ) -> None:
        self.model, self.decoder, self.mode, self.blocker, self.window = model, decoder, mode, blocker, window
        self.own_hooks, self.report = own_hooks, report
        self.caller_splits: Callable[[], bool] = lambda: False
        self.out_of_memory = False
        self.compiles = True
        self.warned: set[str] = set()
        self.compiled: set[str] = set()

    @property
    def unusable(self) -> str | None:
        """Return why no program of the engine can run; None if programs can."""
        return self.blocker or (OOM_REASON if self.out_of_memory else None)

    def reason(self, request: GreedyRequest) -> str | None:
        """Return why the stock loop answers a request; empty if nothing else was asked for, None if it does not."""
        if not wants_graphs(self.mode, self.decoder):
            return ""
        longest = getattr(self.decoder.config, "max_position_embeddings", 0)
        length = request.prompt_length + (request.max_new_tokens or 0)
        reasons = {
            self.unusable: self.unusable,
            "more than token ids are asked for, such as scores or a streamer": not request.token_ids_only,
            "logits processors change or forbid tokens": len(request.processors),
            "answers may stop for other reasons than their length and end tokens": request.max_new_tokens is None,
            f"answers may end with more than {MAX_EOS_IDS} tokens": len(request.eos_ids) > MAX_EOS_IDS,
            "the prompts follow a filled cache": kv_cache.length(request.cache),
            f"prompt and answer may outgrow the model's {longest} positions": length > longest,
            f"prompt and answer may outgrow the {self.window} tokens that a layer sees": (
                self.window is not None and length > self.window
            ),
            "somebody else has hooks on the decoder's layers": self._has_other_hooks(),
            "the model is being trained": self.model.training,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def _has_other_hooks(self) -> bool:
        hooks = (
            chain(layer._forward_hooks.values(), layer._forward_pre_hooks.values()) for layer in self.decoder.layers
        )
        owners = (getattr(getattr(hook, "func", hook), "__self__", None) for hook in chain.from_iterable(hooks))
        return any(owner is not self.own_hooks for owner in owners)

    def fall_back(self, reason: str) -> None:
        """Report that the stock loop answers, with a warning the first time."""
        if not reason:
            return
        self.report("answer", "stock loop", reason)
        self._warn_once(STOCK_LOOP.format(self.mode, reason))

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)

    def handle(self, error: Exception) -> None:
        """Do without graphs after a lack of memory, and without compiled layers after any other recoverable error.

        Raises:
            OutOfMemoryError: The caller asks fewer prompts at a time, see `caller_splits`.
            PassLostError: The decoder is split, and its other ranks wait in the pass that has failed here.
        """
        # Torch says what it gave up at in the error behind its own.
        reason = first_line(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error)
        if tp_group_of(self.decoder.layers) is not None:
            raise PassLostError(
                f"engine={self.mode}: {reason}; the engine cannot fall back, since the other ranks wait in "
                "the failed pass: use engine=eager, which needs the least memory and no compiler"
            ) from error
        if isinstance(error, torch.cuda.OutOfMemoryError):
            if self.caller_splits():
                raise error
            self.out_of_memory = True
            self.fall_back(OOM_REASON)
            return
        self.report("answer", "not compiled", reason)
        self._warn_once(f"layers are not fused, since they cannot be compiled ({reason})")
        self.compiles = False

    @contextmanager
    def compiling(self, what: str, device: torch.device, wanted: bool = True) -> Iterator[None]:
        """Compile what runs inside, on a GPU and if wanted, and log how long the first time of a kind takes."""
        wanted = wanted and self.compiles and device.type == "cuda"
        first, since = wanted and what not in self.compiled, time.perf_counter()
        if first:
            self.compiled.add(what)
            processes.log_line(f"fusing the model's layers for {what} ...")
        with compiling(wanted):
            yield
        if first:
            processes.log_line(f"fused the model's layers for {what}: {time.perf_counter() - since:.1f} s")
