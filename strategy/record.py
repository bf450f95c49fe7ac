"""What a pruned run really did."""

from dataclasses import dataclass, field

from torch import Tensor

from strategy.base import Plan


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


@dataclass
class RunRecord:
    """What happened since the engine was attached; sums run over samples.

    plan: None if nothing is pruned. stages: the prunes of the last prefill that had visual tokens.
    samples: prefilled samples with visual tokens; the sums are theirs. kept_sum: tokens left, a stage.
    token_layers: visual tokens times the layers that saw them. cache_length, cache_bytes: what the KV
    cache held after the prefill, measured on its tensors.
    """

    strategy: str
    depth: int
    plan: Plan | None
    stages: list[Stage] = field(default_factory=list)
    samples: int = 0
    visual_sum: int = 0
    kept_sum: list[int] = field(default_factory=list)
    token_layers: int = 0
    cache_length_sum: int = 0
    cache_bytes_sum: float = 0

    def add_stages(self, visual: list[int], stages: list[Stage]) -> None:
        """Count a finished prefill of samples with so many visual tokens each."""
        self.stages = stages
        self.samples += len(visual)
        self.visual_sum += sum(visual)
        self.kept_sum = self.kept_sum or [0] * len(stages)
        tokens, from_layer = sum(visual), 0
        for number, stage in enumerate(stages):
            self.kept_sum[number] += stage.after
            self.token_layers += tokens * (stage.layer - from_layer)
            tokens, from_layer = stage.after, stage.layer
        self.token_layers += tokens * (self.depth - from_layer)

    def add_cache(self, samples: int, length: int, size: float) -> None:
        """Count the cache a finished prefill left: its length, and its size in bytes a sample."""
        self.cache_length_sum += samples * length
        self.cache_bytes_sum += samples * size

    def means(self) -> dict[str, float | list[float]]:
        """The sums a sample: tokens, tokens kept, mean tokens a layer, cache length, cache bytes."""
        count = max(1, self.samples)
        return {
            "visual_tokens": self.visual_sum / count,
            "kept_tokens": [kept / count for kept in self.kept_sum],
            "tokens_per_layer": self.token_layers / count / self.depth,
            "cache_length": self.cache_length_sum / count,
            "cache_bytes": self.cache_bytes_sum / count,
        }

    def summary(self) -> str:
        """One line on the run."""
        means = self.means()
        kept = "/".join(f"{value:g}" for value in means["kept_tokens"])  # type: ignore[union-attr]
        where = f"prune layers {list(self.plan.layers)}" if self.plan else "unpruned"
        return (
            f"{self.strategy}: {where}, {means['visual_tokens']:g} visual tokens"
            + (f" kept {kept}" if kept else "")
            + f", cache length {means['cache_length']:g}, {self.samples} samples (means over samples)"
        )
