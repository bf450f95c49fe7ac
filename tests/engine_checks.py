"""What the engine owes every backbone: one matrix of backbones, strategies and batch layouts.

A backbone's tests import everything from here and give a fixture `family`, a `Family`.
"""

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import BARE, ENCODED, FULL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

import strategy
from strategy import VTRConfig
from strategy.kernels.kv_cache import length as cache_length
from strategy.kernels.kv_cache import read as cache_read
from strategy.kernels.kv_cache import write as cache_write

TOLERANCE = {"rtol": 0, "atol": 1e-4}
STEPS = 16 if FULL else 6  # tokens that follow a prompt
STAGES = {"prune_layer": [1, 4, 8], "ref_layers": 0}
GOLDEN = Path(__file__).parent / "golden"


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


def flash_stand_in(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """What flash attention computes, [B, R, heads, D], where the package and a GPU are missing.

    query [B, heads, R, D]: the last R of the tokens of key and value [B, key heads, L, D]; mask [B, L].
    """
    assert mask is None or mask.dim() == 2, "flash attention knows padding only"
    rows, length = query.shape[2], key.shape[2]
    seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    seen = seen if mask is None else seen & mask.bool()[:, None, None]
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    return output.nan_to_num().transpose(1, 2)


def use_flash(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a decoder of transformers 4.48 and later think it has flash attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return flash_stand_in(query, key, value, mask), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", forward)
    decoder.config._attn_implementation = "flash_attention_2"


@dataclass(frozen=True)
class Family:
    """A backbone's tiny random decoder and how it is called.

    published: names its file in tests/golden; None for a family without published outputs. kind, config: the classes
    of the decoder and its configuration; more: what that needs beyond TEXT. extra: arguments that add features, [N, C]
    a layer, to the N visual tokens of [B, S] after the first layers; none where the family has no such thing. flash:
    makes a decoder call `flash_stand_in` as it would call flash attention.
    """

    name: str
    published: str | None
    kind: type[nn.Module]
    config: type
    more: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Tensor, list[Tensor]], dict[str, Any]] = lambda visual, features: {}
    flash: Callable[[Any, pytest.MonkeyPatch], None] = use_flash
    decoders: dict[str, Any] = field(default_factory=dict)

    def build(self, config: dict[str, Any], attention: str) -> Any:
        """A decoder of that configuration."""
        return self.kind._from_config(self.config(**config), attn_implementation=attention).eval()

    def decoder(self, attention: str) -> Any:
        """A random decoder, the same one at each call, in float32."""
        if attention not in self.decoders:
            torch.manual_seed(0)
            self.decoders[attention] = self.build(TEXT | self.more, attention)
        return self.decoders[attention]

    def cache(self) -> Any:
        """An empty cache."""
        return DynamicCache()

    @torch.no_grad()
    def run(
        self,
        decoder: Any,
        embeddings: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        extra: dict[str, Any] | None = None,
    ) -> Tensor:
        """The last hidden state of a forward call; mask [B, S] and positions [B, S] as for text, or None."""
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra or {},
        ).last_hidden_state


@dataclass
class Batch:
    """Prompts with visual spans: embeddings [B, S, C], mask [B, S] or None, and the layout."""

    embeddings: Tensor
    mask: Tensor | None
    layout: list[list[tuple[Any, ...]]]

    def positions(self, more: int = 0) -> Tensor:
        """Position ids of the prompts and `more` later tokens, counting real tokens only."""
        real = torch.ones(self.embeddings.shape[:2]) if self.mask is None else self.mask
        real = torch.cat([real, torch.ones(len(real), more)], dim=1)
        return (real.cumsum(1) - 1).clamp(min=0).long()

    def visual(self, sample: int) -> Tensor:
        """Indices of a sample's visual tokens."""
        places = []
        for start, (frames, height, width), *lead in self.layout[sample]:
            size = sum(lead) + height * width
            starts = start if isinstance(start, tuple) else range(start, start + frames * size, size)
            places += [at for first in starts for at in range(first, first + size)]
        return torch.tensor(places).long()

    def extra(self, family: Family, more: int = 0) -> dict[str, Any]:
        """What the family adds at the visual tokens, for the prompts and `more` later tokens."""
        visual = torch.zeros(len(self.embeddings), self.embeddings.shape[1] + more, dtype=torch.bool)
        for sample in range(len(visual)):
            visual[sample, self.visual(sample)] = True
        own = self.embeddings[visual[:, : self.embeddings.shape[1]]]
        return family.extra(visual, [own.roll(layer, dims=-1) for layer in (1, 2, 3)])


# For each sample its spans; then its padding on the left and on the right.
SMALL, WIDE = (1, 6, 7), (1, 5, 9)
LAYOUTS = {
    "one image": ([[(5, SMALL)]], None),
    "two images and text between": ([[(3, SMALL), (50, WIDE)]], None),
    "images at different places": ([[(5, SMALL)], [(40, SMALL)]], None),
    "images of different size": ([[(5, SMALL)], [(9, WIDE)], [(2, (1, 8, 8))]], None),
    "a video with text between its frames": ([[((4, 30, 77), (3, 4, 6))]], None),
    "a video and an image": ([[((4, 30, 77), (3, 4, 6))], [(2, (2, 3, 4)), (60, SMALL)]], [(0, 0), (2, 0)]),
    "a video with class tokens": ([[(5, (3, 4, 6), 1)], [(5, (3, 4, 6), 1)]], None),
    "class tokens and none": ([[((4, 31, 77), (3, 4, 6), 2), (104, (1, 2, 2))], [(60, SMALL)]], [(0, 0), (2, 0)]),
    "one sample without an image": ([[(5, SMALL)], []], None),
    "padded on the left": ([[(5, SMALL)], [(20, WIDE)], []], [(0, 0), (11, 0), (30, 0)]),
    "padded on the right": ([[(5, SMALL)], [(20, WIDE)]], [(0, 0), (0, 7)]),
    "a row, one patch and an image": ([[(5, (1, 1, 30))], [(9, (1, 1, 1)), (20, (1, 2, 5))], [(40, SMALL)]], None),
}


def make(name: str, width: int) -> Batch:
    """The batch of that name, with random embeddings."""
    layout, padding = LAYOUTS[name]
    length = 110
    generator = torch.Generator().manual_seed(len(name))
    mask = None
    if padding:
        at = torch.arange(length)
        mask = torch.stack([(at >= left) & (at < length - right) for left, right in padding]).long()
    return Batch(torch.randn(len(layout), length, width, generator=generator), mask, layout)


def prefill(family: Family, decoder: Any, batch: Batch, cache: Any = None) -> Tensor:
    """The last hidden state of the prompts alone, in a new cache if none is given."""
    cache = family.cache() if cache is None else cache
    return family.run(decoder, batch.embeddings, batch.mask, batch.positions(), cache, batch.extra(family))


Merges = dict[tuple[int, int], Tensor]
"""By stage and sample, the weights [K, N] by which the kept tokens became sums."""


@contextmanager
def merges_of(name: str) -> Iterator[Merges]:
    """What a strategy merges meanwhile."""
    kind, seen = strategy.registry.get(name), {}
    plain = kind.merge

    def merge(self: Any, view: Any, kept: Tensor) -> Tensor | None:
        weights = plain(self, view, kept)
        if weights is not None:
            seen.update({(view.stage, sample): own for sample, own in zip(view.samples, weights, strict=True)})
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "merge", merge)
        yield seen


@contextmanager
def hiding(
    decoder: Any, visual: list[Tensor], real: Tensor, prompt: int, stages: list[Any], merges: Merges
) -> Iterator[None]:
    """Give each layer of a stock decoder a mask that hides what is pruned there, and merge what was merged.

    visual: each sample's visual tokens. real: [B, L], prompts of length `prompt` and what follows them.
    Later tokens see the final kept set at every layer, since the whole cache is trimmed to it.
    """
    samples, total = real.shape

    def alive(done: list[Any]) -> Tensor:
        there = real.clone()
        for sample in range(samples):
            if done:
                there[sample, visual[sample]] = False
                there[sample, visual[sample][done[-1].kept[sample]]] = True
        return there

    def hook_for(number: int) -> Any:
        keys = alive([stage for stage in stages if stage.layer <= number])[:, None].repeat(1, total, 1)
        keys[:, prompt:] = alive(stages)[:, None]
        keys = (keys & torch.ones(total, total).tril().bool()) | torch.eye(total, dtype=torch.bool)
        bias = torch.zeros(samples, 1, total, total).masked_fill(~keys[:, None], torch.finfo(torch.float32).min)

        def hook(layer: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            return args, call | {"attention_mask": bias}

        return hook

    def merged(stage: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for sample, places in enumerate(visual):
            if (stage, sample) in merges:
                there = places[stages[stage - 1].kept[sample]] if stage else places
                kept = places[stages[stage].kept[sample]]
                hidden[sample, kept] = merges[stage, sample] @ hidden[sample, there]
        return hidden

    def before(stage: int) -> Any:
        return lambda layer, args: (merged(stage, args[0]), *args[1:])

    def after(stage: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            return (merged(stage, output[0]), *output[1:]) if isinstance(output, tuple) else merged(stage, output)

        return hook

    layers = decoder.layers
    handles = [layer.register_forward_pre_hook(hook_for(at), with_kwargs=True) for at, layer in enumerate(layers)]
    for number, stage in enumerate(stages):
        if stage.layer:
            handles.append(layers[stage.layer - 1].register_forward_hook(after(number)))
        else:
            handles.append(layers[0].register_forward_pre_hook(before(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_oracle(
    family: Family, decoder: Any, batch: Batch, later: Tensor, stages: list[Any], merges: Merges
) -> Tensor:
    """The stock decoder on the prompts and later tokens at once, with what is pruned hidden, what is merged merged."""
    (samples, prompt), more = batch.embeddings.shape[:2], later.shape[1]
    real = torch.ones(samples, prompt + more, dtype=torch.bool)
    if batch.mask is not None:
        real[:, :prompt] = batch.mask.bool()
    embeddings = torch.cat([batch.embeddings, later], dim=1)
    with hiding(decoder, [batch.visual(sample) for sample in range(samples)], real, prompt, stages, merges):
        return family.run(decoder, embeddings, None, batch.positions(more), None, batch.extra(family, more))


def left_of(batch: Batch, sample: int, stage: Any) -> Tensor:
    """Indices in the whole prompt of what is left of a sample after a stage."""
    gone = set(batch.visual(sample).tolist()) - set(batch.visual(sample)[stage.kept[sample]].tolist())
    return torch.tensor([i for i in range(batch.embeddings.shape[1]) if i not in gone])


def all_hooks(model: nn.Module) -> int:
    """How many hooks hang on a model, of whatever kind."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@pytest.fixture(params=LAYOUTS)
def batch(request: pytest.FixtureRequest, family: Family) -> Batch:
    return make(request.param, family.decoder("sdpa").config.hidden_size)


# Those that multiply matrices to score, or to merge.
MULTIPLY = (
    "clse",
    "fastv",
    "pdrop",
    "sparsevlm",
    "priortr",
    "priortr_2f",
    "divprune",
    "cdpruner",
    "dart",
    "apet",
    "pool",
)


def first_layers(name: str) -> list[int]:
    """The earliest layers that a strategy prunes at: 1, and 0 for one that needs no attention."""
    try:
        strategy.registry.get(name)(VTRConfig(strategy=name, prune_layer=0)).plan(strategy.Facts(12, 576))
    except ValueError:
        return [1]
    return [1, 0]


# A strategy and its first layer are one value, so that each such pair meets every batch in `pairs`.
CASES = {f"{name} at {first}": (name, first) for name in BARE for first in first_layers(name)}


@pytest.mark.pairs
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_run_is_the_stock_one_with_the_pruned_tokens_hidden(family, batch, case, attention):
    name, first = CASES[case]
    decoder = family.decoder(attention)
    samples, prompt, width = batch.embeddings.shape
    later = torch.randn(samples, STEPS, width, generator=torch.Generator().manual_seed(1))
    positions, cache = batch.positions(STEPS), family.cache()
    config = VTRConfig(strategy=name, keep_tokens=[20, 12, 5], **STAGES | {"prune_layer": [first, 4, 8]})
    with (
        merges_of(name) as merges,
        strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run,
    ):
        hidden = prefill(family, decoder, batch, cache)
        steps = []
        for step in range(STEPS):
            upto = prompt + step + 1
            mask = None if batch.mask is None else torch.cat([batch.mask, batch.mask.new_ones(samples, step + 1)], 1)
            new = later[:, step : step + 1]
            steps.append(family.run(decoder, new, mask, positions[:, upto - 1 : upto], cache))
    expected = masked_oracle(family, decoder, batch, later, run.stages, merges)
    left = [left_of(batch, sample, run.stages[-1]) for sample in range(samples)]
    assert hidden.shape[1] == max(map(len, left))
    assert {cache_read(cache, layer)[0].shape[2] for layer in range(len(decoder.layers))} == {
        hidden.shape[1] + STEPS
    }, "every layer must hold the final kept set"
    for sample, index in enumerate(left):
        real = slice(None) if batch.mask is None else batch.mask[sample, index].bool()
        torch.testing.assert_close(hidden[sample, -len(index) :][real], expected[sample, index][real], **TOLERANCE)
    if batch.mask is None or batch.mask[:, -1].all():
        torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, prompt:], **TOLERANCE)
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("name", BARE)
def test_each_sample_of_a_batch_keeps_what_it_would_keep_alone(family, batch, name):
    decoder = family.decoder("sdpa")
    config = VTRConfig(strategy=name, keep_tokens=[20, 12, 5], **STAGES)
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as together:
        family.run(decoder, batch.embeddings, batch.mask, batch.positions(), None, batch.extra(family))
    for sample, spans in enumerate(batch.layout):
        real = slice(None) if batch.mask is None else batch.mask[sample].bool()
        pad = 0 if batch.mask is None else int(batch.mask[sample].argmax())
        shifted = [(tuple(i - pad for i in at) if isinstance(at, tuple) else at - pad, *kind) for at, *kind in spans]
        alone = Batch(batch.embeddings[sample : sample + 1, real], None, [shifted])
        with strategy.prune(decoder, config, backbone=family.name, layout=alone.layout) as run:
            family.run(decoder, alone.embeddings, None, alone.positions(), None, alone.extra(family))
        for stage, single in zip(together.stages, run.stages, strict=False):
            assert torch.equal(stage.kept[sample], single.kept[0])
        assert run.stages or not spans


@torch.no_grad()
def test_hidden_states_and_attentions_shrink_with_the_sequence(family, batch):
    # A copy, since transformers 5 leaves hooks of its own on a model that told its hidden states.
    decoder, config = copy.deepcopy(family.decoder("eager")), VTRConfig(keep_tokens=[20, 12, 5], **STAGES)
    told = {"output_hidden_states": True, "output_attentions": True}
    call = {"inputs_embeds": batch.embeddings, "attention_mask": batch.mask, "position_ids": batch.positions()}
    for _ in range(2):
        with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
            output = decoder(**call, **batch.extra(family), **told)
    left = [max(len(left_of(batch, sample, stage)) for sample in range(len(batch.layout))) for stage in run.stages]
    lengths = [
        ([batch.embeddings.shape[1]] + [n for n, stage in zip(left, run.stages, strict=True) if stage.layer <= at])[-1]
        for at in range(len(decoder.layers) + 1)
    ]
    assert [hidden.shape[1] for hidden in output.hidden_states] == lengths
    assert [tuple(rows.shape[2:]) for rows in output.attentions] == [(n, n) for n in lengths[:-1]]
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[-1])


@torch.no_grad()
def test_the_attention_that_strategies_see_is_that_of_the_stock_layers(family, batch):
    decoder, config = copy.deepcopy(family.decoder("eager")), VTRConfig(keep_tokens=[20, 12, 5], **STAGES)
    call = {"inputs_embeds": batch.embeddings, "attention_mask": batch.mask, "position_ids": batch.positions()}
    seen = []

    def watch(view: Any, *_: Any) -> None:
        seen.append((view, view.attention(view.question), view.attention(view.last)))

    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout, watch=watch) as run:
        output = decoder(**call, **batch.extra(family), output_attentions=True)
    assert seen
    for view, *given in seen:
        stock = output.attentions[run.stages[view.stage].layer - 1][list(view.samples)]
        for rows, attention in zip((view.question, view.last), given, strict=True):
            expected = stock.take_along_dim(rows[:, None, :, None], 2).take_along_dim(view.visual[:, None, None], 3)
            real = view.asked if rows is view.question else torch.ones_like(rows, dtype=torch.bool)
            own, wanted = (each.transpose(1, 2)[real] for each in (attention, expected))
            torch.testing.assert_close(own, wanted, **TOLERANCE)


@torch.no_grad()
def test_the_input_and_the_keys_that_strategies_see_are_those_of_the_layer_before(family, batch):
    # A copy, since transformers 5 leaves hooks of its own on a model that told its hidden states.
    decoder, config = copy.deepcopy(family.decoder("eager")), VTRConfig(keep_tokens=[20, 12, 5], **STAGES)
    call = {"inputs_embeds": batch.embeddings, "attention_mask": batch.mask, "position_ids": batch.positions()}
    seen: dict[bool, list[Any]] = {True: [], False: []}

    def watch(view: Any, *_: Any) -> None:
        rows = torch.cat([view.visual, view.question], dim=1)
        seen[cached].append((view, rows, view.entered_at(rows), view.keys_at(rows)))

    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout, watch=watch) as run:
        for cached in (True, False):
            cache = {"past_key_values": family.cache()} if cached else {}
            output = decoder(**call, **cache, **batch.extra(family), use_cache=cached, output_hidden_states=True)
    assert seen[True]
    for (view, rows, entered, keys), (*_, projected) in zip(seen[True], seen[False], strict=True):
        stock = output.hidden_states[run.plan.layers[view.stage] - 1][list(view.samples)]
        real = torch.cat([torch.ones_like(view.visual, dtype=torch.bool), view.asked], dim=1)
        torch.testing.assert_close(entered[real], stock.take_along_dim(rows[..., None], 1)[real], **TOLERANCE)
        # The stock layer filled the cache; without one, the engine computes keys from that input.
        own, wanted = (each.transpose(1, 2)[real] for each in (projected, keys))
        torch.testing.assert_close(own, wanted, **TOLERANCE)


def test_sdpa_and_eager_keep_the_same_tokens(family, batch):
    kept = []
    for attention in ("sdpa", "eager"):
        decoder = family.decoder(attention)
        with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout) as run:
            prefill(family, decoder, batch)
        kept.append([tensor for stage in run.stages for tensor in stage.kept])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def run_with_steps(family, decoder, batch, config, steps=3):
    """The hidden states of the prompts and of a few later tokens, and the record."""
    samples, prompt, width = batch.embeddings.shape
    later = torch.randn(samples, steps, width, generator=torch.Generator().manual_seed(1))
    positions, cache = batch.positions(steps), family.cache()
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        hidden = [prefill(family, decoder, batch, cache)]
        for step in range(steps):
            upto = prompt + step + 1
            mask = None if batch.mask is None else torch.cat([batch.mask, batch.mask.new_ones(samples, step + 1)], 1)
            hidden.append(family.run(decoder, later[:, step : step + 1], mask, positions[:, upto - 1 : upto], cache))
    return hidden, run


def test_flash_attention_is_called_as_it_wants_to_be(family, batch, monkeypatch):
    decoder, config = family.decoder("sdpa"), VTRConfig(keep_tokens=[20, 12, 5], **STAGES)
    flash = copy.deepcopy(decoder)
    family.flash(flash, monkeypatch)
    expected, run = run_with_steps(family, decoder, batch, config)
    hidden, other = run_with_steps(family, flash, batch, config)
    for sample in range(len(batch.layout)):
        index = left_of(batch, sample, run.stages[-1])
        real = slice(None) if batch.mask is None else batch.mask[sample, index].bool()
        mine, its = (h[0][sample, -len(index) :][real] for h in (hidden, expected))
        torch.testing.assert_close(mine, its, **TOLERANCE)
        for stage, same in zip(run.stages, other.stages, strict=True):
            assert torch.equal(stage.kept[sample], same.kept[sample])
    torch.testing.assert_close(torch.cat(hidden[1:], dim=1), torch.cat(expected[1:], dim=1), **TOLERANCE)


def test_the_record_says_what_was_kept(family):
    batch = make("images of different size", family.decoder("sdpa").config.hidden_size)
    decoder, cache = family.decoder("sdpa"), family.cache()
    config = VTRConfig(keep_tokens=[20, 12, 5], prune_layer=[1, 3, 6], ref_layers=0)
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        prefill(family, decoder, batch, cache)
    whole = [42, 45, 64]
    shares = decoder_shares(family)
    kept = [[min(n, max(1, math.floor(b / 576 * n))) if shares else b for n in whole] for b in (20, 12, 5)]
    assert [stage.layer for stage in run.stages] == [1, 3, 6]
    assert [stage.before for stage in run.stages] == [sum(whole), sum(kept[0]), sum(kept[1])]
    assert [stage.after for stage in run.stages] == [sum(stage) for stage in kept]
    assert [[len(tensor) for tensor in stage.kept] for stage in run.stages] == kept
    for stage in run.stages:
        assert all(torch.equal(tensor, tensor.unique()) for tensor in stage.kept), "in their original order"
    means = run.means()
    layers = len(decoder.layers)
    per_layer = [sum(whole), *[sum(kept[0])] * 2, *[sum(kept[1])] * 3, *[sum(kept[2])] * (layers - 6)]
    assert means["tokens_per_layer"] == pytest.approx(sum(per_layer) / layers / 3)
    held = sum(tensor.nbytes for layer in range(layers) for tensor in cache_read(cache, layer))
    assert (means["cache_bytes"], means["cache_length"]) == (held / 3, cache_length(cache))
    assert "[1, 3, 6]" in run.summary()


def decoder_shares(family: Family) -> bool:
    """Whether budgets are shares of a sample's own tokens on this backbone."""
    from strategy.backbone import _backbones

    return _backbones[family.name].own_size


@pytest.mark.parametrize(
    "config", [VTRConfig(enabled=False), VTRConfig(retain_ratio=[1.0, 1.0, 1.0], **STAGES), VTRConfig(keep_tokens=4096)]
)
def test_keeping_everything_is_the_stock_model_to_the_last_bit(family, batch, config):
    decoder = family.decoder("sdpa")
    stock = prefill(family, decoder, batch)
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        hidden = prefill(family, decoder, batch)
    assert torch.equal(hidden, stock)
    assert all(stage.before == stage.after for stage in run.stages)
    assert run.means()["cache_length"] == batch.embeddings.shape[1]


def flop_counter() -> FlopCounterMode:
    """torch's own counter, told what two kernels cost that it does not know."""

    def attention(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * 2 * math.prod(query) * key[2]

    def experts(tokens: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(tokens) * weights[-1]

    known = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._grouped_mm: experts,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BARE)
def test_the_counts_are_those_of_torch(family, name, attention):
    decoder, cache = family.decoder(attention), family.cache()
    batch = make("images of different size", decoder.config.hidden_size)
    config = VTRConfig(strategy=name, keep_tokens=[20, 12, 5], **STAGES)
    seen = []
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        for _ in range(2):  # the second time some are remembered
            with flop_counter() as counter:
                prefill(family, decoder, batch, cache := family.cache())
            seen.append(counter.get_total_flops() / 2)
        with flop_counter() as counter:
            for step in range(3):
                positions = torch.full((3, 1), 110 + step)
                family.run(decoder, batch.embeddings[:, :1], None, positions, cache)
    costs = run.means()["multiply_adds"]
    if name in MULTIPLY:
        assert costs["scoring"] > 0
    assert 3 * (costs["prefill"] + costs["scoring"]) == pytest.approx(sum(seen) / 2, rel=0.01)
    assert costs["decode"] == pytest.approx(counter.get_total_flops() / 2 / 9, rel=0.01)
    assert (run.prompts, run.samples, run.decoded) == (6, 6, 9)


def test_without_a_known_closing_the_question_free_prompt_ends_behind_the_picture(family, batch):
    kept = []
    for name in ("priortr", "priortr_2f"):
        config = VTRConfig(strategy=name, keep_tokens=20, prune_layer=4)
        with strategy.prune(family.decoder("sdpa"), config, backbone=family.name, layout=batch.layout) as run:
            prefill(family, family.decoder("sdpa"), batch)
        kept.append(run.stages[0].kept)
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


@pytest.mark.parametrize(
    ("method", "wrong", "words"),
    [
        ("plan", lambda self, facts: None, r"plan\(\) returned None, want a Plan"),
        ("score", lambda self, view: None, r"score\(\) returned NoneType, want a tensor \[1, 42\]"),
        ("select", lambda self, view: None, r"select\(\) returned NoneType, want a tensor \[1, \d+\]"),
        ("select", lambda self, view: view.visual, r"select\(\) returned \[1, 42\], want a tensor \[1, \d+\]"),
        ("select", lambda self, view: view.top(self.score(view)).flip(1), r"select\(\) returned indices that are not"),
        ("select", lambda self, view: view.top(self.score(view)) // 2, r"select\(\) returned indices that are not"),
        ("select", lambda self, view: view.top(self.score(view)) + 42, r"select\(\) returned indices that are not"),
        (
            "score",
            lambda self, view: view.features[..., :-5, 0],
            r"score\(\) returned \[1, 37\], want a tensor \[1, 42\]",
        ),
        (
            "merge",
            lambda self, view, kept: kept.float(),
            r"merge\(\) returned \[1, \d+\], want a tensor \[1, \d+, 42\]",
        ),
    ],
)
def test_what_a_strategy_returns_wrongly_is_named(family, monkeypatch, method, wrong, words):
    monkeypatch.setattr(strategy.clse.CLSE, method, wrong)
    budget = {"retain_ratio": 0.5} if decoder_shares(family) else {"keep_tokens": 20}
    decoder, config = family.decoder("sdpa"), VTRConfig(**budget, prune_layer=4)
    batch = make("one image", decoder.config.hidden_size)
    with (
        pytest.raises(ValueError, match=f"^clse: {words}"),
        strategy.prune(decoder, config, backbone=family.name, layout=batch.layout),
    ):
        prefill(family, decoder, batch)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder.layers)


@pytest.mark.parametrize(("name", "scores"), [("clse", True), ("divprune", False)])
def test_a_watch_is_given_the_scores_of_strategies_that_have_some(family, name, scores):
    decoder, seen = family.decoder("sdpa"), []
    batch = make("images of different size", decoder.config.hidden_size)
    config = VTRConfig(strategy=name, keep_tokens=20, prune_layer=4)
    watch = lambda *given: seen.append(given)  # noqa: E731
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout, watch=watch) as run:
        prefill(family, decoder, batch)
    assert len(seen) == 3
    for view, given, kept in seen:
        assert torch.equal(kept, torch.stack([run.stages[0].kept[sample] for sample in view.samples]))
        assert (given is not None) == scores
        assert given is None or torch.equal(view.top(given), kept)


def test_text_alone_is_the_stock_model_to_the_last_bit(family):
    batch = make("one image", family.decoder("sdpa").config.hidden_size)
    decoder = family.decoder("sdpa")
    stock = prefill(family, decoder, batch)
    with strategy.prune(decoder, VTRConfig(), backbone=family.name, layout=[[]]) as run:
        hidden = prefill(family, decoder, batch)
    assert torch.equal(hidden, stock)
    assert (run.samples, run.stages) == (0, [])


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_the_stock_one(family, fails):
    batch = make("one image", family.decoder("sdpa").config.hidden_size)
    decoder = family.decoder("sdpa")
    stock = prefill(family, decoder, batch)
    methods = {name: getattr(module, "forward") for name, module in decoder.named_modules()}  # noqa: B009

    def fail(*_: Any) -> None:
        raise KeyError("in the middle of a layer")

    config = VTRConfig(keep_tokens=[20, 12, 5], prune_layer=[1, 3, 6], ref_layers=0)
    try:
        with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout):
            broken = decoder.layers[4].mlp.register_forward_hook(fail) if fails else None
            prefill(family, decoder, batch)
    except KeyError:
        broken.remove()
    assert all_hooks(decoder) == 0
    assert methods == {name: getattr(module, "forward") for name, module in decoder.named_modules()}  # noqa: B009
    again = prefill(family, decoder, batch)
    assert torch.equal(again, stock)


def test_a_failed_call_leaves_nothing_for_the_next_one(family):
    batch = make("one image", family.decoder("sdpa").config.hidden_size)
    decoder = family.decoder("sdpa")
    config = VTRConfig(keep_tokens=[20, 12, 5], **STAGES)
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        first = prefill(family, decoder, batch)
        broken = decoder.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prefill(family, decoder, batch)
        broken.remove()
        assert torch.equal(prefill(family, decoder, batch), first)
    assert run.samples == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["images of different size", "padded on the left"])
def test_later_calls_need_no_positions(family, name, attention):
    decoder = family.decoder(attention)
    batch = make(name, decoder.config.hidden_size)
    later = torch.randn(3, 5, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    outputs = []
    for positions in (batch.positions(5)[:, -5:], None):
        cache = family.cache()
        with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout):
            prefill(family, decoder, batch, cache)
            for new in (slice(0, 2), slice(2, 5)):
                given = None if positions is None else positions[:, new]
                outputs.append(family.run(decoder, later[:, new], None, given, cache))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_a_cache_may_be_repeated_after_the_prompt(family):
    decoder = family.decoder("sdpa")
    batch = make("padded on the left", decoder.config.hidden_size)
    later = torch.randn(3, 1, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    outputs = []
    for copies in (1, 2):
        cache = family.cache()
        with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout):
            prefill(family, decoder, batch, cache)
            for layer in range(len(decoder.layers)):
                cache_write(cache, layer, *(t.repeat_interleave(copies, 0) for t in cache_read(cache, layer)))
            outputs.append(family.run(decoder, later.repeat_interleave(copies, 0), None, None, cache))
    torch.testing.assert_close(outputs[0].repeat_interleave(2, 0), outputs[1], **TOLERANCE)


def test_a_copied_cache_and_positions_given_by_hand_are_honoured(family):
    decoder, cache = family.decoder("sdpa"), family.cache()
    batch = make("one image", decoder.config.hidden_size)
    later = torch.randn(1, 1, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout):
        prefill(family, decoder, batch, cache)
        copies = [copy.deepcopy(cache) for _ in range(3)]
        given = [None, batch.positions(1)[:, -1:], batch.positions(1)[:, -1:] + 40]
        plain, same, other = (
            family.run(decoder, later, None, positions, its) for positions, its in zip(given, copies, strict=True)
        )
        assert torch.equal(plain, family.run(decoder, later, None, None, cache))
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other)


def test_a_copy_of_an_attached_model_prunes_as_it_does(family, batch):
    decoder = family.decoder("sdpa")
    with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout) as run:
        hidden = prefill(family, decoder, batch)
        copied = copy.deepcopy(decoder)
        assert torch.equal(prefill(family, copied, batch), hidden)
        assert run.prompts == len(batch.layout), "the copy has a record of its own"


def interrupt(*_: Any) -> None:
    """What the keyboard does to a hook."""
    raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_for_the_next_call(family):
    decoder = family.decoder("sdpa")
    batch = make("one image", decoder.config.hidden_size)
    layout = [list(batch.layout[0])]
    with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=layout):
        broken = decoder.layers[4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            prefill(family, decoder, batch)
        broken.remove()
        layout[0].clear()  # a text follows
        hidden = prefill(family, decoder, batch)
    assert torch.equal(hidden, prefill(family, decoder, batch))


def test_what_scoring_costs_without_a_cache_is_counted_apart(family):
    decoder = family.decoder("sdpa")
    batch = make("one image", decoder.config.hidden_size)
    costs = []
    with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout) as run:
        for cache in (family.cache(), None, family.cache()):
            before = run.multiply_adds["scoring"]
            family.run(decoder, batch.embeddings, None, batch.positions(), cache, batch.extra(family))
            costs.append(run.multiply_adds["scoring"] - before)
    assert costs[0] == costs[2] < costs[1]


def test_a_mask_that_does_not_count_the_pruned_tokens_is_refused(family):
    decoder, cache = family.decoder("sdpa"), family.cache()
    batch = make("one image", decoder.config.hidden_size)
    with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout):
        prefill(family, decoder, batch, cache)
        mask = torch.ones(1, cache_length(cache) + 1)
        with pytest.raises(ValueError, match="the prompt had 110 and 1 follow it"):
            family.run(decoder, batch.embeddings[:, :1], mask, None, cache)
        mask = torch.ones(1, cache_length(cache) + 109)
        with pytest.raises(ValueError, match="the prompt had 110 and 109 follow it"):
            family.run(decoder, batch.embeddings[:, :109], mask, None, cache)


def test_positional_arguments_are_refused(family):
    decoder = family.decoder("sdpa")
    with (
        strategy.prune(decoder, VTRConfig(), backbone=family.name, layout=[[]]),
        pytest.raises(ValueError, match="keyword arguments only"),
    ):
        decoder(torch.zeros(1, 3, dtype=torch.long))


def test_an_attached_model_can_be_forgotten(family):
    decoder = copy.deepcopy(family.decoder("sdpa"))
    strategy.attach(decoder, VTRConfig(), backbone=family.name, layout=[[]])
    ghost = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert ghost() is None


def test_attaching_twice_is_refused(family):
    decoder = family.decoder("sdpa")
    strategy.attach(decoder, VTRConfig(), backbone=family.name, layout=[[]])
    try:
        with pytest.raises(ValueError, match="already"):
            strategy.attach(decoder, VTRConfig(), backbone=family.name, layout=[[]])
    finally:
        strategy.detach(decoder)
    with pytest.raises(ValueError, match="not being pruned"):
        strategy.detach(decoder)


def test_what_does_not_fit_is_refused_and_leaves_no_hook(family):
    decoder = family.decoder("sdpa")
    for config, layout, words in [
        (VTRConfig(prune_layer=[1, 2, 99], ref_layers=0), [[]], "layers"),
        (VTRConfig(), None, "layout"),
    ]:
        with pytest.raises(ValueError, match=words):
            strategy.attach(decoder, config, backbone=family.name, layout=layout)
        assert all_hooks(decoder) == 0


@pytest.mark.parametrize("name", ENCODED)
def test_a_strategy_that_looks_at_the_vision_tower_is_refused_where_there_is_none(family, name):
    decoder = family.decoder("sdpa")
    words = rf"^{name} looks at what the vision tower saw, but a bare decoder has none: choose"
    with pytest.raises(ValueError, match=words):
        strategy.attach(decoder, VTRConfig(strategy=name), backbone=family.name, layout=[[]])
    assert all_hooks(decoder) == 0


def test_an_unknown_model_is_told_what_is_known(family):
    with pytest.raises(ValueError, match=rf"Linear belongs to no backbone .*{family.name}.*register_backbone"):
        strategy.attach(nn.Linear(2, 2), VTRConfig())
    with pytest.raises(ValueError, match="backbone='nothing': allowed are"):
        strategy.attach(nn.Linear(2, 2), VTRConfig(), backbone="nothing")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_published_run(family, attention):
    if family.published is None:
        pytest.skip(f"there are no published outputs of {family.name}: its reference is the stock decoder alone")
    tensors = load_file(GOLDEN / f"{family.published}.safetensors")
    facts = json.loads((GOLDEN / f"{family.published}.json").read_text())
    decoder, cache = family.build(facts["config"], attention), family.cache()
    decoder.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    start, embeddings = facts["visual_start"], tensors["inputs_embeds"]
    visual = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    visual[:, start : start + facts["visual_tokens"]] = True
    extra = family.extra(visual, [tensors[name] for name in sorted(tensors) if name.startswith("deepstack")])
    config = VTRConfig(keep_tokens=facts.get("keep_tokens"), retain_ratio=facts.get("retain_ratio"))
    with strategy.prune(decoder, config, backbone=family.name, layout=[[(start, facts["grid"])]]) as run:
        hidden = family.run(decoder, embeddings, None, tensors.get("position_ids"), cache, extra)
    assert [stage.layer for stage in run.stages] == facts["prune_layers"]
    assert [stage.after for stage in run.stages] == facts["kept"]
    for number, stage in enumerate(run.stages):
        assert torch.equal(stage.kept[0], tensors[f"keep{number}"])
    torch.testing.assert_close(hidden, tensors["last_hidden_state"], **TOLERANCE)
    lengths = [cache_read(cache, layer)[0].shape[2] for layer in range(len(decoder.layers))]
    assert lengths == facts["kv_lengths"]
