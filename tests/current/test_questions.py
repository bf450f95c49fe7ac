"""Questions of any kind, asked through lmms-eval."""

from dataclasses import replace

import pytest
from ahead_checks import *  # noqa: F403
from batch_checks import *  # noqa: F403
from lmms_checks import Wrapper
from question_checks import *  # noqa: F403
from question_checks import Question, ask, texts
from qwen_lmms_checks import qwen

# Linear layers cannot be fused, so the graph engine never answers.
del test_a_lack_of_memory_of_the_graph_engine_leads_to_smaller_batches_and_not_to_the_stock_loop  # noqa: F821


@pytest.fixture(scope="module")
def wrapper() -> Wrapper:
    return replace(qwen("qwen3_5_vtr", "qwen3_5", "shapes-qwen3_5", 32), always=",enable_thinking=False")


def test_pruned_answers_are_right(wrapper):
    lm = wrapper.load("strategy=clse,keep_tokens=192")
    said = wrapper.answers(lm, 12)
    assert said == wrapper.questions["answer"][:12]
    assert lm.record.samples == 12
    assert lm.record.means()["kept_tokens"][-1] < lm.record.means()["visual_tokens"] / 8


def test_an_answer_without_the_end_of_its_thoughts_is_empty_and_said_so(wrapper):
    lm = replace(wrapper, always="").load("enabled=False", force_simple=True)
    row = wrapper.questions[0]
    with pytest.warns(UserWarning, match="leaves nothing of an answer that holds no </think>: raise max_new_tokens"):
        answers, _ = ask(lm, [Question([row["image"]], question=row["question"])])
    assert texts(answers) == [""]
