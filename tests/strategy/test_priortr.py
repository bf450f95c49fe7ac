"""PriorTR beside an account of it in plain loops, where the order of its aggregations tells."""

import dataclasses
import math

import pytest
import torch
from views import view_of

from strategy import VTRConfig, registry

HEADS, WORDS, TOKENS, KEPT = 8, 9, 128, 64
PADDING = (2, 5)  # words that are none


def attention(seed, words):
    """What words pay the visual tokens, [1, heads, words, tokens]; each pays something to the text, too."""
    logits = 3 * torch.randn(1, HEADS, words, TOKENS + words, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1)[..., :TOKENS]


def mean(values):
    return math.fsum(values) / len(values)


def words_then_heads(paid, over_heads):
    """Aggregate what words pay, [heads][words][tokens], first over the words."""
    return [over_heads([mean([word[t] for word in head]) for head in paid]) for t in range(TOKENS)]


def heads_then_words(paid, over_heads):
    words = range(len(paid[0]))
    return [mean([over_heads([head[w][t] for head in paid]) for w in words]) for t in range(TOKENS)]


def scores(posterior, prior):
    p, q = ([value / math.fsum(paid) for value in paid] for paid in (posterior, prior))
    return [a * math.log(a / b) for a, b in zip(p, q, strict=True)]


@pytest.mark.parametrize("name", ["priortr", "priortr_2f"])
@pytest.mark.parametrize("query", ["question", "last"])
@pytest.mark.parametrize("head", ["mean", "max"])
def test_words_are_averaged_before_heads_are_aggregated(name, query, head):
    paid, asked = attention(0, WORDS), torch.tensor([[word not in PADDING for word in range(WORDS)]])
    empty = attention(1, 1)[:, :, 0]  # of the prompt without its question
    view = dataclasses.replace(view_of(torch.zeros(1, TOKENS, 1), paid, asked=asked), prior=empty)
    found = registry.get(name)(VTRConfig(strategy=name, query_aggregation=query, head_aggregation=head)).score(view)
    words = [word for word in range(WORDS) if word not in PADDING]
    meant = paid[0].double()[:, words if query == "question" else words[-1:]].tolist()
    first = (empty[0][:, None] if name == "priortr_2f" else paid[0][:, words[:1]]).double().tolist()
    over_heads = max if head == "max" else mean
    prior = words_then_heads(first, over_heads)
    expected = scores(words_then_heads(meant, over_heads), prior)
    torch.testing.assert_close(found[0].double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    if (query, head) == ("question", "max"):
        other = torch.tensor(scores(heads_then_words(meant, over_heads), prior))
        assert set(other.topk(KEPT).indices.tolist()) != set(found[0].topk(KEPT).indices.tolist())
