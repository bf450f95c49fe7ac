"""CDPruner by hand, and its greedy choice beside determinants."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from views import view_of

from strategy import VTRConfig, registry
from strategy.base import JointView
from strategy.cdpruner import greedy_map, relevance


def make():
    return registry.get("cdpruner")(VTRConfig(strategy="cdpruner"))


def test_each_token_is_the_one_that_adds_most_volume():
    # Diagonal 4, 3, 2: token 0 first. Then 1 has 3 - 3 * 3 / 4 = 0.75 left, 2 has 2 - 0 = 2 and comes next.
    kernel = torch.tensor([[[4.0, 3, 0], [3, 3, 0], [0, 0, 2]]])
    assert greedy_map(kernel, 3).tolist() == [[0, 2, 1]]


def test_copies_add_nothing_and_the_first_of_equals_is_taken():
    x, y, z = torch.eye(3)
    tokens = torch.stack([x, y, x, y, z])[None]
    assert greedy_map(tokens @ tokens.transpose(1, 2), 5).tolist() == [[0, 1, 4, 2, 3]]
    assert greedy_map(torch.ones(1, 4, 4), 3).tolist() == [[0, 1, 2]]
    assert greedy_map(torch.zeros(1, 4, 4), 3).tolist() == [[0, 1, 2]]


@given(seed=st.integers(0, 10**6), count=st.integers(2, 7), width=st.integers(2, 9), data=st.data())
def test_the_choice_is_greedy_in_the_determinant(seed, count, width, data):
    keep = data.draw(st.integers(1, min(count, width)))  # more than the rank have no volume
    tokens = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed)).double()
    kernel = tokens @ tokens.transpose(1, 2)
    for own, chosen in zip(kernel, greedy_map(kernel.float(), keep).tolist(), strict=True):
        assert len(set(chosen)) == keep
        for step in range(keep):
            left = [at for at in range(count) if at not in chosen[:step]]
            sets = {at: [*chosen[:step], at] for at in left}
            volume = {at: own[which][:, which].det().item() for at, which in sets.items()}
            assert volume[chosen[step]] >= max(volume.values()) * (1 - 1e-3)


def test_on_six_tokens_that_fall_into_three_kinds_it_is_the_best_of_all_sets():
    tokens = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0.1], [0, 0.9, 0], [0, 0.1, 1], [0.1, 0, 0.8]])
    kernel = tokens @ tokens.T
    volumes = {which: kernel[list(which)][:, list(which)].det().item() for which in itertools.combinations(range(6), 3)}
    assert tuple(sorted(greedy_map(kernel[None], 3)[0].tolist())) == max(volumes, key=volumes.get)


def test_relevance_is_the_cosine_with_the_mean_word_scaled_to_one():
    # The mean of the words asked is (1, 1) / 2: cosines 1, 0 and -1 become 1, 1/2 and 0. The padding would turn it.
    visual = torch.tensor([[[2.0, 2], [3, -3], [-1, -1]]])
    words = torch.tensor([[[50.0, -50], [1, 0], [0, 1]]])
    asked = torch.tensor([[False, True, True]])
    torch.testing.assert_close(relevance(visual, words, asked), torch.tensor([[1, 0.5, 0]]), rtol=0, atol=1e-5)
    assert torch.equal(relevance(visual[:, :1], words, asked), torch.ones(1, 1))


def test_the_question_decides_which_token_of_each_kind_stays():
    # The question is nearest to token 1. Beside it token 0 adds little, being like it, and 3 little, being irrelevant.
    visual = torch.tensor([[[1.0, 0, 0], [1, 0, 0.5], [0, 1, 0.4], [0, 1, 0]]])
    words = torch.tensor([[[0.1, 0.0, 1]]])
    view = view_of(visual, torch.zeros(1, 1, 1, 4), keep=2, words=words)
    assert make().select(view).tolist() == [[1, 2]]


@pytest.mark.parametrize("samples", [1, 3])
def test_a_batch_keeps_what_its_samples_keep(samples):
    generator = torch.Generator().manual_seed(0)
    features, words = (
        torch.randn(samples, 40, 16, generator=generator),
        torch.randn(samples, 5, 16, generator=generator),
    )
    attention = torch.zeros(samples, 1, 5, 40)
    together = make().select(view_of(features, attention, keep=12, words=words))
    for sample in range(samples):
        own = slice(sample, sample + 1)
        alone = make().select(view_of(features[own], attention[own], keep=12, words=words[own]))
        assert torch.equal(together[own], alone)
    assert (together.diff(dim=1) > 0).all()


def test_with_clip_the_tokens_that_answer_least_to_the_question_are_relevant():
    # In the joint space the cosines are 1, 0.6 and -1, of length whatever: relevance 0, 0.2 and 1. By embeddings, the
    # first token would be the relevant one.
    joint = JointView(torch.tensor([[[5.0, 0], [3, 4], [-0.1, 0]]]), torch.tensor([[1.0, 0]]))
    words = torch.tensor([[[1.0, 0, 0]]])
    strategy = registry.get("cdpruner")(VTRConfig(strategy="cdpruner", clip_text="a CLIP"))
    view = view_of(torch.eye(3)[None], torch.zeros(1, 1, 1, 3), keep=2, words=words, joint=joint)
    assert strategy.select(view).tolist() == [[1, 2]]
    assert strategy.encoder_layer == -2
    assert make().select(view_of(torch.eye(3)[None], torch.zeros(1, 1, 1, 3), keep=1, words=words)).tolist() == [[0]]
    assert make().encoder_layer is None


@pytest.mark.parametrize("none", [None, "None", "none"])
def test_clip_text_is_a_name_or_none(none):
    assert VTRConfig(strategy="cdpruner", clip_text=none).weight_sources == ()
    assert VTRConfig(strategy="cdpruner", clip_text="openai/clip").weight_sources == ("openai/clip",)
    assert VTRConfig(strategy="clse").weight_sources == ()
    with pytest.raises(ValueError, match=r"^clip_text=' ': want a hub id or a folder; omit it for none$"):
        VTRConfig(strategy="cdpruner", clip_text=" ")
