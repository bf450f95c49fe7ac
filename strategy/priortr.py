"""PriorTR (arXiv 2606.24156): what the question adds to the attention that is paid before it is read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategy.base import Strategy, View
from strategy.options import Options, one_of, option
from strategy.plan import Facts, Plan
from strategy.registry import register

EPS = 1e-10


def divergence(posterior: Tensor, prior: Tensor) -> Tensor:
    """Compute each token's part in the Kullback-Leibler divergence, S = P log(P / Q).

    Args:
        posterior: Attention [G, N], which is normalised over the N visual tokens.
        prior: Attention [G, N], likewise.

    Returns:
        float32 [G, N].
    """
    p, q = (x.float() / (x.float().sum(-1, keepdim=True) + EPS) for x in (posterior, prior))
    return p * torch.log((p + EPS) / (q + EPS))


def rows_sum(attention: Tensor, rows: Tensor) -> Tensor:
    """Sum the attention [G, heads, R, N] that some tokens, the `rows` [G, R], pay; [G, heads, N]."""
    return (attention * rows[:, None, :, None]).sum(2)


def read_query(name: str, value: Any) -> str:
    """Read whose attention is compared; `auto` is a word of PriorTR's command lines for the default."""
    word = one_of(lambda: ("question", "last", "auto"))(name, value)
    return "question" if word == "auto" else word


@dataclass(frozen=True, init=False)
class PriorTROptions(Options):
    """The options of PriorTR."""

    query_aggregation: str = option(
        "question",
        read_query,
        "Whose attention is compared: the mean over all tokens behind the visual ones (`question`, also called "
        "`auto`), or the last token's (`last`).",
    )
    head_aggregation: str = option(
        "mean", one_of(lambda: ("mean", "max")), "How the heads of that attention become one: `mean` or `max`."
    )


@register("priortr")
class PriorTR(Strategy):
    """S = P log(P / Q), P the attention of the question and Q that of the first token behind the picture.

    Attention is causal, so that first token knows nothing of the question: one prefill gives both. P is the
    mean over all tokens behind the visual ones (`query_aggregation=question`) or that of the last one alone
    (`last`), in each head; then heads count by their mean or their maximum (`head_aggregation`). One stage at
    layer 3, 192 tokens.
    """

    options_type = PriorTROptions

    def plan(self, facts: Facts) -> Plan:
        return Plan.resolve(self.prune_layers(facts, (3,)), None, self.budget(tokens=192), facts)

    def score(self, view: View) -> Tensor:
        attention = view.attention(view.question)
        if self.options.query_aggregation == "last":
            posterior = view.attention(view.last)[:, :, 0]
        else:
            posterior = rows_sum(attention, view.asked) / view.asked.sum(1)[:, None, None]
        return divergence(self.heads(posterior), self.heads(self.prior(view, attention)))

    def prior(self, view: View, attention: Tensor) -> Tensor:
        """Return Q [G, heads, N] of the attention [G, heads, R, N] of the tokens behind the visual ones."""
        return rows_sum(attention, view.asked & (view.asked.cumsum(1) == 1))

    def heads(self, attention: Tensor) -> Tensor:
        """Aggregate the heads of attention [G, heads, N] to [G, N]."""
        return attention.amax(1) if self.options.head_aggregation == "max" else attention.mean(1)


@register("priortr_2f")
class PriorTR2F(PriorTR):
    """PriorTR with Q from a second prefill, over the same pictures without the question.

    That prompt ends as a template does, right behind the picture, and Q is the attention of its last token at the
    layer before the prune. Only the layers before the prune run twice.
    """

    question_free = True

    def prior(self, view: View, attention: Tensor) -> Tensor:
        assert view.prior is not None
        return view.prior
