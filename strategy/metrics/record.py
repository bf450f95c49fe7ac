"""What a pruned run really did."""

import copy
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from functools import reduce
from itertools import zip_longest
from typing import Any, NamedTuple

from torch import Tensor

from strategy.distributed.collectives import gather
from strategy.metrics.timing import Clock
from strategy.plan import Plan

PARTS = ("vision", "prefill", "scoring", "head")
NO_SUMS = ("strategy", "depth", "plan", "stages", "graph_decisions")
logger = logging.getLogger("strategy.graph")


@dataclass(frozen=True)
class Stage:
    """One prune of the last prefill.

    layer: pruned right before this layer ran. before, after: visual tokens, over the whole batch.
    kept: for each sample the tokens left, a LongTensor in the numbering of its unpruned visual tokens.
    """

    layer: int
    before: int
    after: int
    kept: tuple[Tensor, ...]


class GraphDecision(NamedTuple):
    """What the graph engine decided about a program or an answer, and why.

    program: "vision", "prefill" or "decode", with the shapes of its inputs; or "answer". action: "captured", "evicted"
    or "rejected" for the CUDA graph of a program, "ran without a graph" for a run of it (for the first time of some
    shapes, of all shapes together); "stock modules" for vision modules that run as they are; "stock loop",
    "stock prefill" or "not compiled" for an answer.
    """

    program: str
    action: str
    reason: str


@dataclass
class RunRecord:
    """What happened since a model was attached; sums run over samples.

    Where heads are split over processes, each process's record counts what that process did and held: its share of the
    decoder, all of the vision tower and the output head.

    Attributes:
        strategy: Its name, or "unpruned".
        depth: Layers of the decoder.
        plan: None if nothing is pruned.
        stages: The prunes of the last prefill that had visual tokens.
        prompts: Prefilled samples of calls with visual tokens.
        samples: Those of the prompts that had visual tokens themselves.
        unpruned_samples: Samples whose visual tokens followed a filled cache, and so were not pruned. They are not
            counted elsewhere.
        visual_sum: Visual tokens before the first prune.
        kept_sum: Tokens left, for each stage.
        layer_sums: Visual tokens, for each layer.
        cache_length_sum, cache_bytes_sum: What the KV cache held after the prefill, measured on its tensors.
        decoded: Tokens given to the decoder on a filled cache, those of a further turn too; the first token of an
            answer is not among them.
        multiply_adds: By part, see `means`.
        clock: Seconds by part; `prefill` includes its scoring. The first call of each shape is counted while it runs,
            which slows its vision and scoring.
        graph_decisions: How often the graph engine took each decision, see `graph_report`.
    """

    strategy: str
    depth: int
    plan: Plan | None
    stages: list[Stage] = field(default_factory=list)
    prompts: int = 0
    samples: int = 0
    unpruned_samples: int = 0
    visual_sum: int = 0
    kept_sum: list[int] = field(default_factory=list)
    layer_sums: list[int] = field(default_factory=list)
    cache_length_sum: int = 0
    cache_bytes_sum: float = 0
    decoded: int = 0
    multiply_adds: Counter[str] = field(default_factory=Counter)
    clock: Clock = field(default_factory=Clock)
    graph_decisions: Counter[GraphDecision] = field(default_factory=Counter)

    def add_stages(self, prompts: int, visual: list[int], stages: list[Stage]) -> None:
        """Count a finished prefill.

        Args:
            prompts: Samples of the prefill.
            visual: Visual tokens of each sample that had some.
            stages: The prunes.
        """
        self.stages = stages
        self.prompts += prompts
        self.samples += len(visual)
        self.visual_sum += sum(visual)
        self.kept_sum = self.kept_sum or [0] * len(stages)
        self.layer_sums = self.layer_sums or [0] * self.depth
        for number, stage in enumerate(stages):
            self.kept_sum[number] += stage.after
        for layer in range(self.depth):
            self.layer_sums[layer] += next((s.after for s in reversed(stages) if s.layer <= layer), sum(visual))

    def add_cache(self, samples: int, length: int, size: float) -> None:
        """Count the cache that a finished prefill left.

        Args:
            samples: Samples with visual tokens.
            length: Tokens that the cache holds.
            size: Its bytes a sample.
        """
        self.cache_length_sum += samples * length
        self.cache_bytes_sum += samples * size

    def decide(self, program: str, action: str, reason: str) -> None:
        """Count a decision of the graph engine, and log it the first time to the logger `strategy.graph`."""
        decision = GraphDecision(program, action, reason)
        self.graph_decisions[decision] += 1
        if self.graph_decisions[decision] == 1:
            logger.info("%s: %s (%s)", *decision)

    def graph_report(self) -> str:
        """Return a line for each decision of the graph engine: how often, about what, which, and why."""
        return "\n".join(
            f"{times} x {program}: {action} ({reason})"
            for (program, action, reason), times in self.graph_decisions.items()
        )

    def snapshot(self) -> dict[str, Any]:
        """Return all that was counted so far, except the clock and the decisions about graphs."""
        kept = [each.name for each in fields(self) if each.name not in ("clock", "graph_decisions")]
        return {name: copy.copy(getattr(self, name)) for name in kept}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Forget what was counted since the snapshot was taken."""
        vars(self).update(snapshot)

    def reduce_over_ranks(self, counts: bool = True) -> "RunRecord":
        """Sum the records of all processes of a run; each process must call it. `stages` stay this process's own.

        Args:
            counts: False for a process that did the same as another process, which counts.
        """
        sums = {name: value for name, value in self.snapshot().items() if name not in NO_SUMS}
        everyone = gather(sums | {"seconds": self.clock.seconds()} if counts else None)
        total = reduce(_added, filter(None, everyone))
        merged = copy.copy(self)
        merged.clock = Clock()
        merged.clock.sums.update(total.pop("seconds"))
        merged.restore(total | {"multiply_adds": Counter(total["multiply_adds"])})
        return merged

    def means(self) -> dict[str, Any]:
        """Return the sums a sample, ready for JSON.

        visual_tokens, kept_tokens (a stage), tokens_by_layer, tokens_per_layer (the mean layer), cache_length,
        cache_bytes, decoded_tokens. multiply_adds of a prefill by part: vision (tower and projector), prefill
        (the decoder's layers), scoring (with selecting and merging), head; and decode, those of one decoded
        token, head included. seconds: vision, prefill (without scoring), scoring, decode (all tokens).
        """
        count, prompts = max(1, self.samples), max(1, self.prompts)
        costs, seconds = self.multiply_adds, defaultdict(float, self.clock.seconds())
        seconds["prefill"] -= seconds["scoring"]
        return {
            "visual_tokens": self.visual_sum / count,
            "kept_tokens": [kept / count for kept in self.kept_sum],
            "tokens_by_layer": [tokens / count for tokens in self.layer_sums],
            "tokens_per_layer": sum(self.layer_sums) / count / self.depth,
            "cache_length": self.cache_length_sum / count,
            "cache_bytes": self.cache_bytes_sum / count,
            "decoded_tokens": self.decoded / prompts,
            "multiply_adds": {part: costs[part] / prompts for part in PARTS}
            | {"decode": costs["decode"] / max(1, self.decoded)},
            "seconds": {part: seconds[part] / prompts for part in ("vision", "prefill", "scoring", "decode")},
        }

    def scalar_means(self) -> dict[str, float]:
        """Return the means that are single numbers, each under a name of its own."""
        found: dict[str, float] = {}
        for name, value in self.means().items():
            if isinstance(value, dict):
                found.update((f"{name}_{part}", number) for part, number in value.items())
            elif not isinstance(value, list):
                found[name] = value
        return found

    def summary(self) -> str:
        """Return a few lines about the run."""
        means = self.means()
        kept = "/".join(f"{value:g}" for value in means["kept_tokens"])
        where = f"prune layers {list(self.plan.layers)}" if self.plan else "unpruned"
        costs, seconds = means["multiply_adds"], means["seconds"]
        unpruned = ""
        if self.unpruned_samples:
            unpruned = f", {self.unpruned_samples} more with visual tokens behind a filled cache, which were not pruned"
        return (
            f"{self.strategy}: {where}, {means['visual_tokens']:g} visual tokens"
            + (f" kept {kept}" if kept else "")
            + f", {means['tokens_per_layer']:.1f} in the mean layer, cache length {means['cache_length']:g}, "
            f"{means['cache_bytes']:,.0f} bytes, {self.samples} samples{unpruned} (means over samples)\n"
            + f"multiply-adds: {', '.join(f'{part} {costs[part]:.3g}' for part in PARTS)} for a prefill, "
            f"{costs['decode']:.3g} for a decoded token\n"
            + f"seconds: {', '.join(f'{part} {value:.4f}' for part, value in seconds.items())}"
        )


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {name: _added(one.get(name, 0), other.get(name, 0)) for name in one | other}
    if isinstance(one, list):  # empty where there was no prompt
        return [a + b for a, b in zip_longest(one, other, fillvalue=0)]
    return one + other
