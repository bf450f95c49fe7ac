"""What the engine owes whoever feeds it anything at all: right numbers or one clear sentence.

A backbone's tests import everything from here and give a fixture `family`, see `engine_checks`.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_checks import STAGES, TOLERANCE, Batch, all_hooks, left_of, make, masked_oracle, merges_of, prefill
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import BARE
from torch import Tensor

import strategy
from strategy import VTRConfig


@st.composite
def drawn_batches(draw: st.DrawFn) -> tuple[list[list[tuple[Any, ...]]], Tensor]:
    """A layout of few samples, each with few visuals of any small grid, and the mask of their padding."""
    layouts, lengths = [], []
    for _ in range(draw(st.integers(1, 3))):
        at, spans = draw(st.integers(0, 4)), []
        for _ in range(draw(st.integers(0, 3))):
            grid, lead = tuple(draw(st.integers(1, 5)) for _ in "THW"), draw(st.integers(0, 2))
            gap, starts = draw(st.integers(0, 2)), []
            for _ in range(grid[0]):
                starts.append(at)
                at += lead + grid[1] * grid[2] + gap
            spans.append((tuple(starts), grid, lead))
        layouts.append(spans)
        lengths.append(at + draw(st.integers(1, 4)))
    length = max(lengths)
    lefts = [draw(st.integers(0, length - own)) for own in lengths]
    layout = [
        [(tuple(left + start for start in starts), *kind) for starts, *kind in spans]
        for left, spans in zip(lefts, layouts, strict=True)
    ]
    at = torch.arange(length)
    mask = [(at >= left) & (at < left + own) for left, own in zip(lefts, lengths, strict=True)]
    return layout, torch.stack(mask).long()


@st.composite
def drawn_configs(draw: st.DrawFn) -> VTRConfig:
    """Any knobs that fit a decoder of twelve layers."""
    layers = sorted(draw(st.sets(st.integers(1, 11), min_size=1, max_size=3)))
    budget = {"keep_tokens": st.integers(1, 80), "retain_ratio": st.floats(0.001, 1)}
    name, method = draw(st.sampled_from(sorted(budget))), draw(st.sampled_from(BARE))
    own = {
        "clse_cutoff_ratio": draw(st.floats(0.01, 2)),
        "clse_temp": draw(st.floats(0.01, 5)),
        "clse_fft_3d": draw(st.booleans()),
    }
    return VTRConfig(
        strategy=method,
        prune_layer=layers,
        ref_layers=draw(st.integers(0, layers[0] - 1)),
        **(own if method == "clse" else {}),
        **{name: [draw(budget[name]) for _ in layers]},
    )


@given(drawn=drawn_batches(), config=drawn_configs(), attention=st.sampled_from(["sdpa", "eager"]), seed=st.integers(0))
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore:grid .* is too thin for a spectrum")
def test_any_prompt_and_any_knobs_give_the_stock_model_with_the_pruned_tokens_hidden(
    family, drawn, config, attention, seed
):
    (layout, mask), decoder = drawn, family.decoder(attention)
    generator = torch.Generator().manual_seed(seed % 2**63)
    embeddings = torch.randn(*mask.shape, decoder.config.hidden_size, generator=generator)
    batch = Batch(embeddings, mask, layout)
    with (
        merges_of(config.strategy) as merges,
        strategy.prune(decoder, config, backbone=family.name, layout=layout) as run,
    ):
        hidden = prefill(family, decoder, batch)
    assert all_hooks(decoder) == 0
    assert torch.isfinite(hidden).all()
    expected = masked_oracle(family, decoder, batch, embeddings[:, :0], run.stages, merges)
    for sample in range(len(layout)):
        before = len(batch.visual(sample))
        for stage, count in zip(run.stages, run.plan.kept(before) if before else [0] * 3, strict=False):
            kept = stage.kept[sample]
            assert torch.equal(kept, kept.unique())
            assert len(kept) == count
            assert not len(kept) or (kept.min() >= 0 and kept.max() < before)
        index = left_of(batch, sample, run.stages[-1]) if run.stages else torch.arange(mask.shape[1])
        real = mask[sample, index].bool()
        torch.testing.assert_close(hidden[sample, -len(index) :][real], expected[sample, index][real], **TOLERANCE)


@given(
    spans=st.lists(
        st.tuples(
            st.integers(-5, 120) | st.tuples(st.integers(-5, 120), st.integers(-5, 120)),
            st.tuples(*[st.integers(-1, 9)] * 3) | st.tuples(st.integers(1, 9)),
            st.integers(-1, 3),
        ),
        max_size=3,
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore:grid .* is too thin for a spectrum")
def test_any_layout_works_or_is_one_clear_sentence(family, spans):
    decoder = family.decoder("sdpa")
    batch = Batch(make("one image", decoder.config.hidden_size).embeddings, None, [spans])
    try:
        with strategy.prune(decoder, VTRConfig(keep_tokens=10), backbone=family.name, layout=batch.layout) as run:
            hidden = family.run(decoder, batch.embeddings, None, batch.positions(), None)
        assert torch.isfinite(hidden).all()
        assert hidden.shape[1] == 110 - sum(stage.before - stage.after for stage in run.stages)
    except ValueError as error:
        refused = str(error)
    else:
        refused = "sample 0: nothing"
    assert refused.startswith("sample 0: ")
    assert "\n" not in refused
    assert all_hooks(decoder) == 0


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ([[(5, (1, 6, 7))], []], "2 samples"),
        ([[(100, (1, 6, 7))]], "must follow"),
        ([[(5, (1, 6, 7)), (20, (1, 5, 5))]], "inside another"),
        ([[(5, (1, 0, 7))]], "from 1 up"),
        ([[(-3, (1, 6, 7))]], "begins before"),
        ([[(5, (1, 6, 7), -1)]], "lead=-1"),
        ([[(5, (2, 6, 7), 12)]], "must follow"),
        ([[((5, 50), (3, 3, 4))]], "3 frames, but 2 starts"),
        ([[((5, 50, 60), (3, 3, 4))]], "at 60 begins before 62"),
        ([[((5, 50, 30), (3, 3, 4))]], "at 30 begins before 62"),
        ([[((5, 50), (2, 3, 4)), (20, (1, 3, 4))]], "at 20 begins before 62"),
        ([[((5, 50, 100), (3, 3, 4))]], "must follow"),
    ],
)
def test_a_layout_that_does_not_fit_the_prompt_is_refused(family, layout, words):
    decoder = family.decoder("sdpa")
    batch = make("one image", decoder.config.hidden_size)
    with (
        strategy.prune(decoder, VTRConfig(), backbone=family.name, layout=layout),
        pytest.raises(ValueError, match=words),
    ):
        prefill(family, decoder, batch)
    assert all_hooks(decoder) == 0


def test_a_strategy_may_pin_and_exclude_tokens(family, monkeypatch):
    decoder = family.decoder("sdpa")
    batch = make("one image", decoder.config.hidden_size)

    def score(self: Any, view: Any) -> Tensor:
        scores = torch.full(view.features.shape[:2], -math.inf)
        scores[:, ::2] = math.inf
        return scores

    monkeypatch.setattr(strategy.registry.get("random"), "score", score)
    config = VTRConfig(strategy="random", keep_tokens=[20, 12, 5], **STAGES)
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        prefill(family, decoder, batch)
    kept = run.stages[0].kept[0]
    assert (kept[: run.plan.kept(42)[0]] % 2 == 0).all()


def test_threads_that_share_a_model_do_not_mix_their_prompts(family):
    decoder, config = family.decoder("sdpa"), VTRConfig(keep_tokens=[20, 12, 5], **STAGES)
    one = make("one image", decoder.config.hidden_size)
    batches = [one, Batch(one.embeddings.flip(-1), None, one.layout)]
    meeting = threading.Barrier(len(batches), timeout=60)

    def meet(*_: Any) -> None:
        meeting.wait()

    with strategy.prune(decoder, config, backbone=family.name, layout=one.layout) as run:
        alone = [prefill(family, decoder, batch) for batch in batches]
        # Both threads are in the middle of the layers at the same time.
        handles = [decoder.layers[at].register_forward_pre_hook(meet) for at in (0, 3, 6)]
        with ThreadPoolExecutor(len(batches)) as pool:
            together = list(pool.map(lambda batch: prefill(family, decoder, batch), batches))
        for handle in handles:
            handle.remove()
    assert run.samples == 4
    for mine, its in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCE)


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_named_and_the_model_stays_clean(family, name, value):
    decoder = family.decoder("sdpa")
    batch = make("one image", decoder.config.hidden_size)
    config = VTRConfig(strategy=name, keep_tokens=[20, 12, 5], **STAGES)
    broken = Batch(batch.embeddings.clone(), None, batch.layout)
    broken.embeddings[0, 9, 3] = value
    with strategy.prune(decoder, config, backbone=family.name, layout=batch.layout) as run:
        before = prefill(family, decoder, batch)
        with pytest.raises(ValueError, match="are not finite"):
            prefill(family, decoder, broken)
        assert torch.equal(prefill(family, decoder, batch), before)
    assert run.samples == 2
    assert all_hooks(decoder) == 0
