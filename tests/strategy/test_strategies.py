"""Each strategy on a few tokens whose right answer can be worked out by hand, and the budgets each must meet."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from views import view_of

from strategy import Facts, Strategy, VTRConfig, available, clse, registry
from strategy.baselines import strided
from strategy.divprune import most_diverse
from strategy.sparsevlm import cluster_centres, raters

LLAVA = Facts(depth=32, nominal_tokens=576, pair_cost=1 / 576)
QWEN = Facts(depth=28, nominal_tokens=576, own_size=True, pair_cost=1e-4)
VIDEO = Facts(depth=32, nominal_tokens=2048, video=True, pair_cost=1e-5)
# How many stages there are, the layer they refer to, and the first that may be pruned at.
PUBLISHED = {
    "clse": (3, 0, 1),
    "random": (3, 0, 1),
    "sparsevlm": (3, 0, 1),
    "pdrop": (3, None, 1),
    "fastv": (1, None, 1),
    "priortr": (1, None, 1),
    "priortr_2f": (1, None, 1),
    "divprune": (1, None, 0),
    "cdpruner": (1, None, 0),
    "dart": (1, None, 1),
    "visionzip": (1, None, 0),
    "vispruner": (1, None, 0),
    "scope": (1, None, 0),
    "mmtok": (1, None, 0),
    "holov": (1, None, 0),
    "prunesid": (1, None, 0),
    "eadp": (1, None, 0),
    "apet": (2, None, 0),
    "v2drop": (3, None, 1),
    "uniform": (1, None, 0),
    "pool": (1, None, 0),
}


def make(name, **knobs):
    return registry.get(name)(VTRConfig(strategy=name, **knobs))


def plan(name, facts=LLAVA, **knobs):
    return make(name, **knobs).plan(facts)


def pruned(name, view, **knobs):
    """Which tokens stay, chosen as the engine does, and what their features become."""
    strategy = make(name, **knobs)
    kept = strategy.select(view)
    weights = strategy.merge(view, kept)
    return kept, view.features.take_along_dim(kept[..., None], 1) if weights is None else weights @ view.features


def blank(count, grids=None, **more):
    """A view of `count` tokens, each with its number as its feature, to which nothing is paid."""
    return view_of(torch.arange(float(count)).view(1, count, 1), torch.zeros(1, 1, 1, count), grids, **more)


def test_a_strategy_that_neither_scores_nor_selects_is_refused_by_name():
    class Idle(Strategy):
        def plan(self, facts):
            return plan("fastv", facts)

    with pytest.raises(ValueError, match=r"Idle defines neither score\(\) nor select\(\): define one of the two"):
        Idle(VTRConfig())
    with pytest.raises(NotImplementedError, match="DivPrune selects tokens without scores"):
        make("divprune").score(blank(4))


# --- what is scored by attention ---


@pytest.mark.parametrize("name", ["fastv", "pdrop"])
def test_the_last_tokens_attention_counts_in_the_mean_over_heads(name):
    first_word, last_word = [[0.1, 0.1, 0.1, 0.7]] * 2, [[0.4, 0.0, 0.1, 0.1], [0.0, 0.2, 0.5, 0.1]]
    attention = torch.tensor([[first_word, last_word]]).transpose(1, 2)
    view = view_of(torch.zeros(1, 4, 2), attention, keep=2)
    torch.testing.assert_close(make(name).score(view), torch.tensor([[0.2, 0.1, 0.3, 0.1]]))
    kept, features = pruned(name, view)
    assert kept.tolist() == [[0, 2]]
    assert torch.equal(features, view.features[:, [0, 2]])


# A word's attention to three tokens, by head. Means over heads: (2 1 1) and (1 2 2); maxima: (4 2 2) and (2 2 4). Means
# over the words, by head: (2 1 3) and (1 2 0), which have maxima of (2 2 3).
FIRST, LAST = [[0.4, 0.0, 0.2], [0.0, 0.2, 0.0]], [[0.0, 0.2, 0.4], [0.2, 0.2, 0.0]]
FILL = [[9.0, 0.0, 1.0], [5.0, 0.0, 8.0]]


@pytest.mark.parametrize("words", ["FL", "xFL", "FLx", "xxFxL"])
@pytest.mark.parametrize(
    ("query", "head", "expected"),
    [
        # Q = 1/2 1/4 1/4 in all; P = 1/3 1/3 1/3, 1/5 2/5 2/5, 2/7 2/7 3/7 and 1/4 1/4 2/4; S = P log(P / Q).
        ("question", "mean", [1 / 3 * math.log(2 / 3), 1 / 3 * math.log(4 / 3), 1 / 3 * math.log(4 / 3)]),
        ("last", "mean", [1 / 5 * math.log(2 / 5), 2 / 5 * math.log(8 / 5), 2 / 5 * math.log(8 / 5)]),
        ("question", "max", [2 / 7 * math.log(4 / 7), 2 / 7 * math.log(8 / 7), 3 / 7 * math.log(12 / 7)]),
        ("last", "max", [1 / 4 * math.log(1 / 2), 0, 1 / 2 * math.log(2)]),
    ],
)
def test_priortr_is_the_divergence_of_the_question_from_its_first_word(query, head, expected, words):
    attention = torch.tensor([[{"F": FIRST, "L": LAST, "x": FILL}[word] for word in words]]).transpose(1, 2)
    asked = torch.tensor([[word != "x" for word in words]])
    view = view_of(torch.zeros(1, 3, 1), attention, asked=asked)
    view = dataclasses.replace(view, last=torch.tensor([[3 + words.index("L")]]))
    scores = make("priortr", query_aggregation=query, head_aggregation=head).score(view)
    torch.testing.assert_close(scores, torch.tensor([expected]), rtol=0, atol=1e-6)


# --- divprune ---


def test_divprune_takes_the_token_farthest_in_angle_from_those_it_has():
    # 100 has the farthest neighbour (80 off); 205 is 105 from it, 0 is 100; then 0, 180 (25 off) and 10 (10 off).
    angles = torch.tensor([0.0, 10, 100, 180, 205]).deg2rad()
    lengths = torch.tensor([1.0, 9, 0.1, 20, 3])[:, None]
    features = (torch.stack([angles.cos(), angles.sin()], dim=1) * lengths)[None]
    assert most_diverse(features, 5).tolist() == [[2, 4, 0, 3, 1]]
    view = view_of(features, torch.zeros(1, 1, 1, 5), keep=3)
    assert pruned("divprune", view)[0].tolist() == [[0, 2, 4]]


def test_divprune_takes_the_first_of_equals_and_copies_last():
    x, y, z = torch.eye(3)
    assert most_diverse(torch.stack([x, y, x, y, z])[None], 5).tolist() == [[4, 0, 1, 2, 3]]
    assert most_diverse(torch.ones(1, 4, 2), 3).tolist() == [[0, 1, 2]]


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), dims=st.integers(2, 6), data=st.data())
def test_divprune_is_the_greedy_choice(seed, count, dims, data):
    keep = data.draw(st.integers(1, count))
    features = torch.randn(2, count, dims, generator=torch.Generator().manual_seed(seed))
    for sample, chosen in zip(features.double().tolist(), most_diverse(features, keep).tolist(), strict=True):

        def distance(a, b, sample=sample):
            dot = sum(x * y for x, y in zip(sample[a], sample[b], strict=True))
            return 1 - dot / math.hypot(*sample[a]) / math.hypot(*sample[b])

        assert len(set(chosen)) == keep
        for n, token in enumerate(chosen):
            left = [t for t in range(count) if t not in chosen[:n]]
            worth = {t: min([distance(t, o) for o in (chosen[:n] or range(count)) if o != t] or [0]) for t in left}
            assert worth[token] >= max(worth.values()) - 1e-5  # float32 may not tell closer ones apart


# --- sparsevlm ---


def test_words_closer_to_the_picture_than_the_mean_word_rate():
    # exp of the likeness to the first token is 6 3 1 and to the second 1 3 6, so a share of 7/20 6/20 7/20 in all.
    one, two = math.log(6), math.log(3)
    visual, words = torch.eye(2)[None], torch.tensor([[[one, 0], [two, two], [0, one], [50, 50]]])
    asked = torch.tensor([[True, True, True, False]])
    assert raters(visual, words, asked).tolist() == [[True, False, True, False]]
    # To the first alone 6/10 3/10 1/10: the middle one is above 1/4, but there are only three words.
    assert raters(visual[:, :1], words, asked).tolist() == [[True, False, False, False]]
    for count in range(1, 21):  # equal words all rate, whichever way their mean is rounded
        assert raters(visual, words[:, :1].expand(-1, count, -1), torch.ones(1, count, dtype=torch.bool)).all(), count


def test_sparsevlm_scores_by_the_mean_attention_of_the_raters_it_chose_first():
    words = torch.tensor([[[math.log(6), 0], [math.log(3), 0], [0, math.log(6)]]])
    by_word = [[0.1, 0.2, 0.4, 0.1], [0.0, 0.0, 0.0, 1.0], [0.3, 0.2, 0.2, 0.1]]
    off = torch.tensor([0.1, -0.1, 0.1, 0.0])
    attention = torch.stack([torch.tensor(by_word) + off, torch.tensor(by_word) - off])[None]
    picture = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0, 1]]])
    first = view_of(torch.rand(1, 4, 2), attention, keep=2, reference=picture, words=words)
    sparse = make("sparsevlm")
    # The first and the last word rate: 2 2 3 1 tenths. The best counts 2 more, the centre of the recycled 1 more.
    expected = torch.tensor([[1.2, 0.2, 2.3, 0.1]])
    torch.testing.assert_close(sparse.score(first), expected)
    later = view_of(first.features, attention, keep=2, reference=-picture, words=words)
    torch.testing.assert_close(sparse.score(dataclasses.replace(later, memo=first.memo)), expected)
    assert not torch.allclose(sparse.score(later), expected)


def test_cluster_centres_are_dense_and_far_from_denser_ones():
    # The third of each clump of five is its densest: exp of -0.005, -0.405, -0.02 and -1.28, times 50 (to the
    # farthest), 10.7, 4.8 and 13.4 (to a denser one). The last token is far from all, but nothing is near it.
    spread = torch.arange(5.0)
    clumps = [0.05 * spread, 10 + 0.45 * spread, -5 + 0.1 * spread, -20 + 0.8 * spread]
    places = torch.cat([*clumps, torch.tensor([30.0])])
    features = places[None, :, None].repeat(2, 1, 4)
    assert cluster_centres(features, 4).tolist() == [[2, 7, 12, 17]] * 2
    assert cluster_centres(features.flip(1), 2).tolist() == [[18, 13]] * 2


def rated(features, keep):
    """A view of tokens [N, C] in falling order of their rating, by one word."""
    attention = torch.linspace(0.1, 0.01, len(features)).view(1, 1, 1, -1)
    return view_of(features[None], attention, keep=keep)


def test_what_is_rated_next_is_recycled_into_the_nearest_centre():
    # 60 tokens, 50 dropped: int(15.0) + 1 = 16 are recycled into 16 // 10 + 1 = 2, behind the 8 best.
    places = torch.full((60,), 5.0)
    places[8:24] = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 9, 9.2, 9.4, 9.6, 9.8, 0.5, 0.6, 9.9, 10, 10.1, 10.2])
    view = rated(places[:, None].repeat(1, 4), keep=10)
    kept, features = pruned("sparsevlm", view)
    assert kept[0, :8].tolist() == list(range(8))
    low, high = kept[0, 8:].tolist()
    assert places[[low, high]].round(decimals=-1).tolist() == [0, 10]
    torch.testing.assert_close(features[0, :, 0], torch.tensor([5.0] * 8 + [2.1 / 7, 87.2 / 9]))


def test_the_best_rated_token_is_never_recycled():
    for keep in (1, 2):
        view = rated(torch.randn(60, 4), keep=keep)
        kept, features = pruned("sparsevlm", view)
        assert kept[0, 0] == 0
        assert torch.equal(features[:, 0], view.features[:, 0])


@pytest.mark.parametrize(("dropped", "clusters"), [(1, 1), (29, 1), (30, 2), (63, 2), (64, 3), (298, 10), (300, 10)])
def test_ten_recycled_tokens_make_one(dropped, clusters):
    view = rated(torch.randn(dropped + 12, 4, generator=torch.Generator().manual_seed(0)), keep=12)
    scores = make("sparsevlm").score(view)[0]
    assert (scores > 2).tolist() == [True] * (12 - clusters) + [False] * (dropped + clusters)
    assert ((scores > 1) & (scores < 2)).sum() == clusters


@given(seed=st.integers(0, 10**6), count=st.integers(2, 150), kinds=st.integers(0, 4), data=st.data())
def test_sparsevlm_makes_every_kept_token_a_mean(seed, count, kinds, data):
    keep = data.draw(st.integers(1, count - 1))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, count, 8, generator=generator)
    if kinds:  # tokens with no more than so many features between them
        features = features[:, torch.randint(kinds, (count,), generator=generator) % count]
    view = view_of(features, torch.rand(2, 2, 3, count, generator=generator).softmax(-1), keep=keep)
    sparse = make("sparsevlm")
    scores = sparse.score(view)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values
    weights = sparse.merge(view, kept)
    if weights is None:
        weights = F.one_hot(kept, count).float()
    assert torch.equal((scores > 1).sum(1), torch.tensor([keep, keep])) or keep == 1
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, keep))
    assert ((weights > 0).sum(1) <= 1).all()
    itself = weights.take_along_dim(kept[..., None], 2)[..., 0]
    assert (itself > 0).all()


# --- controls ---


def test_random_is_the_same_hash_everywhere_and_another_at_each_stage():
    expected = {
        0: [0, 824515495, 1722258072, 3753300549, 3444516145],
        1: [1051910520, 2610268182, 573154070, 2049620076, 2990765299],
    }
    for stage, values in expected.items():
        view = view_of(torch.randn(2, 5, 3), torch.rand(2, 1, 1, 5), stage=stage)
        assert make("random").score(view).tolist() == torch.tensor([values] * 2).float().tolist()
    draws = {tuple(make("random", seed=seed).score(view)[0].tolist()) for seed in (0, 1, 2, 10**9)}
    assert len(draws) == 4
    assert tuple(make("random", seed=1).score(view)[0].tolist()) in draws
    kept = pruned("random", blank(10000, keep=5000))[0][0]
    assert 2400 < (kept < 5000).sum() < 2600
    assert 2400 < (kept % 2).sum() < 2600


@pytest.mark.parametrize(
    ("grids", "keep", "kept"),
    [
        ([(1, 4, 4)], 4, [5, 7, 13, 15]),
        ([(1, 4, 4)], 16, list(range(16))),
        ([(1, 2, 6)], 3, [7, 9, 11]),
        ([(1, 6, 2)], 3, [3, 7, 11]),
        ([(2, 2, 2)], 4, [2, 3, 6, 7]),
        ([(2, 1, 3)], 2, [1, 4]),
        ([(1, 4, 4), (1, 2, 4)], 6, [5, 7, 13, 15, 21, 23]),
        ([(1, 1, 1), (1, 4, 4)], 4, [6, 8, 14, 16]),
    ],
)
def test_uniform_takes_even_steps_in_shares_by_size(grids, keep, kept):
    view = blank(sum(math.prod(grid) for grid in grids), tuple(grids), keep=keep)
    assert pruned("uniform", view)[0].tolist() == [kept]
    assert pruned("pool", view)[0].tolist() == [kept]


@given(grid=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)), data=st.data())
def test_even_steps_are_as_many_as_asked_and_fair_to_frames_and_rows(grid, data):
    count = data.draw(st.integers(1, math.prod(grid)))
    places = strided(grid, count, torch.device("cpu"))
    assert len(set(places.tolist())) == count
    assert places.min() >= 0
    by_frame = places.div(grid[1] * grid[2], rounding_mode="floor").bincount(minlength=grid[0])
    assert by_frame.max() - by_frame.min() <= 1
    by_row = places.div(grid[2], rounding_mode="floor").bincount(minlength=grid[0] * grid[1])
    assert by_row.max() - by_row[by_row > 0].min() <= 1


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [5]), (2, [4, 5]), (4, [2, 3, 4, 5]), (5, [0, 2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])]
)
def test_class_tokens_stay_only_when_no_patch_is_left_to_take(keep, kept):
    view = blank(6, ((1, 2, 2),), keep=keep, on_grid=(torch.arange(2, 6),))
    chosen, features = pruned("pool", view)
    assert chosen.tolist() == pruned("uniform", view)[0].tolist() == [kept]
    if keep == 1:
        assert features.tolist() == [[[3.5]]]  # of the four patches alone


def test_uniform_takes_every_so_manyth_once_the_grid_is_broken():
    view = blank(6, ((1, 4, 4),), keep=2, stage=1)
    assert pruned("uniform", view)[0].tolist() == [[1, 4]]
    assert pruned("pool", view)[1].tolist() == [[[1], [4]]]


@pytest.mark.parametrize(("side", "block"), [(4, 2), (6, 3), (6, 2), (8, 4), (24, 2), (24, 3)])
def test_pool_is_average_pooling_where_blocks_fit(side, block):
    frames = torch.randn(3, side * side, 5, generator=torch.Generator().manual_seed(0)).view(1, -1, 5)
    view = view_of(frames, torch.zeros(1, 1, 1, frames.shape[1]), ((3, side, side),), keep=3 * (side // block) ** 2)
    planes = frames.view(3, side, side, 5).permute(0, 3, 1, 2)
    expected = F.avg_pool2d(planes, block).permute(0, 2, 3, 1).reshape(1, -1, 5)
    torch.testing.assert_close(pruned("pool", view)[1], expected)


def test_pool_mixes_neither_frames_nor_pictures():
    view = blank(6, ((2, 1, 3),), keep=2)
    assert pruned("pool", view)[1].tolist() == [[[1], [4]]]
    view = blank(7, ((1, 1, 1), (1, 1, 6)), keep=2)  # the small picture's share is nothing, and so it is gone
    assert pruned("pool", view)[1].tolist() == [[[2], [5]]]


# --- plans ---


@pytest.mark.parametrize(
    ("name", "facts", "knobs", "layers", "kept"),
    [
        ("fastv", LLAVA, {}, (2,), (288,)),
        ("fastv", LLAVA, {"keep_tokens": 64}, (2,), (64,)),
        ("fastv", QWEN, {}, (2,), (288,)),
        ("pdrop", LLAVA, {}, (8, 16, 24), (288, 144, 72)),
        ("pdrop", LLAVA, {"keep_tokens": 192}, (8, 16, 24), (192, 96, 48)),
        ("pdrop", QWEN, {"keep_tokens": 192}, (7, 14, 21), (192, 96, 48)),
        ("pdrop", LLAVA, {"retain_ratio": 0.25, "prune_layer": [4, 9]}, (4, 9), (144, 72)),
        ("priortr", LLAVA, {}, (3,), (192,)),
        ("priortr", QWEN, {}, (3,), (192,)),
        ("divprune", LLAVA, {}, (0,), (56,)),
        ("divprune", QWEN, {"retain_ratio": 0.25}, (0,), (144,)),
        ("sparsevlm", LLAVA, {}, (2, 6, 15), (300, 200, 110)),
        ("sparsevlm", LLAVA, {"keep_tokens": 128}, (2, 6, 15), (303, 110, 36)),
        ("sparsevlm", LLAVA, {"keep_tokens": 64}, (2, 6, 15), (66, 30, 17)),
        ("sparsevlm", LLAVA, {"keep_tokens": 96}, (2, 6, 15), (150, 100, 55)),
        ("sparsevlm", LLAVA, {"retain_ratio": 0.25}, (2, 6, 15), (225, 150, 82)),
        ("sparsevlm", QWEN, {"keep_tokens": 128}, (2, 5, 13), (303, 110, 36)),
        ("sparsevlm", LLAVA, {"keep_tokens": 128, "prune_layer": 9}, (9,), (128,)),
        ("cdpruner", LLAVA, {"keep_tokens": 64}, (0,), (64,)),
        ("dart", LLAVA, {}, (2,), (128,)),
        ("apet", LLAVA, {}, (0, 16), (288, 96)),
        ("apet", QWEN, {"retain_ratio": 0.125}, (0, 14), (108, 36)),
        ("v2drop", LLAVA, {}, (3, 17, 22), (288, 144, 1)),
        ("v2drop", QWEN, {"keep_tokens": 64}, (3, 15, 19), (96, 48, 1)),
        ("random", LLAVA, {}, (1, 11, 21), (330, 210, 62)),
        ("uniform", LLAVA, {}, (0,), (192,)),
        ("pool", LLAVA, {"retain_ratio": 0.25}, (0,), (144,)),
        # 2 * 576 + 30 k = 32 * 192, and so on; with flops 576 tokens cost twice what they would without pairs.
        ("fastv", LLAVA, {"keep_tokens": 192, "budget_basis": "mean"}, (2,), (166,)),
        ("priortr", LLAVA, {"keep_tokens": 192, "budget_basis": "mean"}, (3,), (152,)),
        ("pdrop", LLAVA, {"keep_tokens": 192, "budget_basis": "mean"}, (8, 16, 24), (109, 54, 27)),
        ("sparsevlm", LLAVA, {"keep_tokens": 192, "budget_basis": "mean"}, (2, 6, 15), (307, 205, 112)),
        ("clse", LLAVA, {"keep_tokens": 192, "budget_basis": "mean"}, (1, 11, 21), (302, 192, 56)),
        ("fastv", LLAVA, {"keep_tokens": 192, "budget_basis": "flops"}, (2,), (154,)),
        ("uniform", LLAVA, {"keep_tokens": 192, "budget_basis": "flops"}, (0,), (192,)),
    ],
)
def test_the_published_layers_and_budgets(name, facts, knobs, layers, kept):
    assert plan(name, facts, **knobs).layers == layers
    assert plan(name, facts, **knobs).kept(576) == kept


@pytest.mark.parametrize("name", available())
def test_default_layers_rise_at_any_depth(name):
    for depth in range(5, 81):
        layers = plan(name, Facts(depth=depth, nominal_tokens=576)).layers
        assert len(layers) == PUBLISHED.get(name, [len(layers)])[0]
        assert list(layers) == sorted(set(layers))
        assert layers[-1] < depth


@pytest.mark.parametrize(("name", "reference"), [(name, reference) for name, (_, reference, _) in PUBLISHED.items()])
def test_only_clse_and_sparsevlm_refer_to_an_earlier_layer(name, reference):
    assert plan(name).reference == reference


@pytest.mark.parametrize(("name", "earliest"), [(name, earliest) for name, (*_, earliest) in PUBLISHED.items()])
def test_only_what_needs_no_attention_prunes_before_the_first_layer(name, earliest):
    if not earliest:
        assert plan(name, prune_layer=0).layers == (0,)
    else:
        with pytest.raises(ValueError, match=r"prune_layer=\[0\]: this strategy prunes at 1 at the earliest"):
            plan(name, prune_layer=0, **({"ref_layers": 0} if name in ("clse", "random") else {}))


@pytest.mark.parametrize("facts", [LLAVA, QWEN, VIDEO], ids=["llava", "qwen", "video"])
@pytest.mark.parametrize("basis", ["mean", "flops"])
@pytest.mark.parametrize("name", available())
def test_a_budget_by_its_cost_is_met_to_within_rounding_or_refused(name, basis, facts):
    def cost(tokens):
        return tokens * (1 + facts.pair_cost * tokens) if basis == "flops" else tokens

    nominal = facts.nominal_tokens
    first = plan(name, facts).layers[0]
    for target in (16, 64, 128, 192, 301, 400, 550, nominal - 1):
        for knobs in ({"keep_tokens": target}, {"retain_ratio": (target + 0.001) / nominal}):
            least, limit = first * cost(nominal), facts.depth * cost(target)
            if limit < least <= 1.001 * limit:
                continue  # rounding decides
            if least > limit:
                with pytest.raises(ValueError, match=f"budget_basis={basis}"):
                    plan(name, facts, budget_basis=basis, **knobs)
                continue
            made = plan(name, facts, budget_basis=basis, **knobs)
            kept = (nominal, *made.kept(nominal))
            spans = [b - a for a, b in zip((0, *made.layers), (*made.layers, facts.depth), strict=True)]
            mean = sum(span * cost(left) for span, left in zip(spans, kept, strict=True)) / facts.depth
            token = sum(span * (cost(n + 1) - cost(n)) for span, n in zip(spans[1:], kept[1:], strict=True))
            assert abs(mean - cost(target)) <= token / facts.depth + 0.01, (target, kept)


@pytest.mark.parametrize("name", available())
def test_a_budget_of_everything_keeps_everything(name):
    for facts in (LLAVA, QWEN, VIDEO, dataclasses.replace(LLAVA, nominal_tokens=7)):
        nominal = facts.nominal_tokens
        for budget in ({"keep_tokens": nominal + more} for more in (0, 1, 63, 5000)):
            for basis in ("mean", "flops"):
                assert set(plan(name, facts, budget_basis=basis, **budget).kept(nominal)) == {nominal}, budget
        for basis in ("mean", "flops"):
            assert set(plan(name, facts, budget_basis=basis, retain_ratio=1).kept(nominal)) == {nominal}


@pytest.mark.parametrize("basis", ["mean", "flops"])
@pytest.mark.parametrize("budget", [{"keep_tokens": [300, 200, 100]}, {"retain_ratio": [0.5, 0.3, 0.1]}])
def test_a_budget_a_stage_leaves_nothing_to_scale(basis, budget):
    with pytest.raises(ValueError, match=f"{next(iter(budget))}=.*budget_basis={basis} wants one number"):
        plan("sparsevlm", budget_basis=basis, **budget)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", available())
def test_what_is_not_finite_is_left_to_the_engine_to_name(name, bad):
    features = torch.randn(1, 60, 4)
    features[0, 7, 1] = bad
    view = view_of(features, torch.rand(1, 2, 3, 60).softmax(-1), ((1, 6, 10),), keep=12)
    kept, _ = pruned(name, view)
    assert len(set(kept[0].tolist())) == 12


@pytest.mark.parametrize("name", available())
def test_no_strategy_reads_a_value_on_the_host(name, monkeypatch):
    """In a CUDA graph that would be an error, and without one a wait; a fake tensor has no values to read."""
    # What other tests left in the cache is real, and no other test may find a fake one there.
    monkeypatch.setattr(clse, "low_pass", clse.low_pass.__wrapped__)
    with FakeTensorMode():
        attention = torch.rand(2, 2, 3, 60).softmax(-1)
        view = view_of(torch.randn(2, 60, 8), attention, ((1, 6, 10),), keep=12)
        strategy = make(name)
        kept = strategy.select(view)
        weights = strategy.merge(view, kept)
    assert (kept.shape, kept.dtype) == ((2, 12), torch.int64)
    assert weights is None or weights.shape == (2, 12, 60)
