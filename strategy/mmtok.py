"""MMTok (ICLR 2026, arXiv 2508.18264): tokens that cover the question and the picture."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.base import Strategy, View
from strategy.kernels.selection import greedy_coverage
from strategy.plan import Facts, Plan
from strategy.registry import register

WORDS, PICTURE = 0.02, 0.2  # temperatures of the softmax over the tokens that cover a word, and a token
ALPHA = 0.5  # weight of the picture's coverage


def shares(targets: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the softmax, over tokens [G, N, C], of their cosine with targets [G, M, C] / temperature, [G, M, N]."""
    # A feature that is not finite has no direction; the engine finds it on the features.
    targets, tokens = (normalize(each.float(), dim=-1).nan_to_num() for each in (targets, tokens))
    return (targets @ tokens.transpose(1, 2) / temperature).softmax(dim=-1)


@register("mmtok")
class MMTok(Strategy):
    """The greedy maximum of the coverage of all words, plus half of that of all visual tokens (section 3).

    One stage before the first layer, 192 tokens. A word is covered by projected features, and a visual token by the
    features of the vision tower's second last layer. Each coverage is a mean, over the words or over the visual tokens.
    Choices: the words are all tokens behind the picture, those of the template included, where the published code takes
    the question alone, and in LLaVA its keywords; the answer of a smaller model, which the paper may add to the words,
    is not there. Pictures of one prompt share the budget.
    """

    encoder_layer = -2

    def plan(self, facts: Facts) -> Plan:
        return self.plan_before_layers(facts, tokens=192)

    def select(self, view: View) -> Tensor:
        assert view.encoder is not None
        words = shares(view.features_at(view.question), view.features, WORDS)
        words = words * (view.asked / view.asked.sum(1, keepdim=True))[..., None]
        picture = shares(view.encoder.features, view.encoder.features, PICTURE) * (ALPHA / view.visual.shape[1])
        likeness = torch.cat([words, picture], dim=1).transpose(1, 2)
        return greedy_coverage(likeness, torch.ones_like(picture[:, 0]), view.keep).sort(dim=1).values
