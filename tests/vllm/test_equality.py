"""vLLM with the plug-in keeps the tokens that the project's engine keeps on transformers, and answers the same."""

import pytest
from engines import Reference, questions, running

import strategy

BUDGETS = {"clse": ({"keep_tokens": 192}, {"retain_ratio": 0.112}, {"keep_tokens": 576})}


@pytest.fixture(scope="module", params=["llava", "qwen2", "qwen3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pair(family, folders):
    folder = folders(family)
    with running(folder, {"strategy": "clse", "keep_tokens": 192}) as engine:
        yield Reference(folder), engine


@pytest.mark.parametrize("name", strategy.available())
def test_kept_tokens_and_answers_are_those_on_transformers(pair, family, name):
    reference, engine = pair
    free = engine.free_blocks
    # One question has another picture; all go through one step together.
    asked = questions(family, 2) + questions(family, 1, first=200)
    for budget in BUDGETS.get(name, ({"keep_tokens": 96},)):
        vtr = {"strategy": name, **budget}
        engine.use(vtr)
        for found, question in zip(engine.answer(asked), asked, strict=True):
            assert reference.agrees(found, question, vtr)
    assert engine.free_blocks == free
