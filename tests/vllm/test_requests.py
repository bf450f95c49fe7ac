"""Requests as a server gets them: at any time, of any kind, and aborted."""

import pytest
from engines import Engine, Question, Reference, given, greedy, questions, qwen_prompt, running
from prometheus_client import REGISTRY

from vllm_vtr.metrics import AFTER, BEFORE, COUNTERS, REQUESTS, SECONDS

VTR = {"strategy": "clse", "retain_ratio": 0.112}
FAMILY = "qwen2"


@pytest.fixture(scope="module")
def reference(folders):
    return Reference(folders(FAMILY))


@pytest.fixture(scope="module")
def engine(folders):
    with running(folders(FAMILY), VTR) as engine:
        yield engine


@pytest.fixture(scope="module")
def mixed():
    """Pictures of several sizes, several in a prompt, and none."""
    pictures = [each.pictures[0] for each in questions(FAMILY, 400)[::50]]
    small = [picture.resize((picture.width // 2, picture.height // 2)) for picture in pictures]
    asked = [Question(qwen_prompt("What colour is the square?", 1), (picture,)) for picture in pictures]
    asked += [
        Question(qwen_prompt("How many red objects are there?", 2), pair)
        for pair in zip(small[1:], pictures[1:], strict=True)
    ]
    asked += [Question(qwen_prompt(f"{colour}?", 0)) for colour in ("What is red", "Is there a ring", "Why")]
    return asked


def arriving(engine: Engine, asked: list[Question], a_step: int, steps: int = 12):
    """Answer questions of which some arrive at each step of the engine."""
    core, answers, waiting = engine.llm.llm_engine, {}, list(enumerate(asked))
    while waiting or core.has_unfinished_requests():
        for number, question in waiting[:a_step]:
            core.add_request(str(number), given(question), greedy(steps))
        del waiting[:a_step]
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = engine.answer_of(output)
    return [answers[number] for number in range(len(asked))]


@pytest.mark.parametrize(("name", "a_step"), [("clse", 1), ("clse", 3), ("visionzip", 3), ("priortr_2f", 3)])
def test_answers_do_not_depend_on_what_is_answered_beside_them(engine, reference, mixed, name, a_step):
    free, vtr = engine.free_blocks, VTR | {"strategy": name}
    engine.use(vtr)
    assert arriving(engine, mixed, a_step) == [
        reference.answer(question, vtr if question.pictures else None) for question in mixed
    ]
    engine.use(VTR)
    assert engine.free_blocks == free


def test_an_aborted_request_gives_back_what_it_holds(engine):
    core, free = engine.llm.llm_engine, engine.free_blocks
    for number, question in enumerate(questions(FAMILY, 4)):
        core.add_request(str(number), given(question), greedy(200, ignore_eos=True))
    for _ in range(3):
        core.step()
    assert engine.free_blocks < free
    core.abort_request([str(number) for number in range(4)])
    while core.has_unfinished_requests():
        core.step()
    core.step()
    assert engine.free_blocks == free
    assert not any(manager.evicted for manager in engine.scheduler.block_managers)
    engine.kept.clear()


def test_what_graphs_read_stays_where_it_is(engine):
    addresses = engine.state.cache_lens.data_ptr(), engine.state.block_tables.slot_mappings.data_ptr()
    engine.answer(questions(FAMILY, 2))
    assert addresses == (engine.state.cache_lens.data_ptr(), engine.state.block_tables.slot_mappings.data_ptr())


def test_a_prompt_that_ends_with_its_picture_is_answered_unpruned(engine):
    question = Question(qwen_prompt("", 1).partition("<|vision_end|>")[0], questions(FAMILY, 1)[0].pictures)
    engine.use({"strategy": "clse", "keep_tokens": 576})
    unpruned = engine.answer([question])
    engine.use(VTR)
    assert engine.answer([question]) == unpruned
    assert unpruned[0].kept == []


def test_log_probabilities_of_a_prompt_are_those_of_the_unpruned_one(engine):
    [question] = questions(FAMILY, 1)
    found = engine.llm.generate([given(question)], greedy(2, prompt_logprobs=0), use_tqdm=False)[0]
    engine.use({"strategy": "clse", "keep_tokens": 576})
    unpruned = engine.llm.generate([given(question)], greedy(2, prompt_logprobs=0), use_tqdm=False)[0]
    engine.use(VTR)
    assert engine.kept == {}
    for logprobs, wanted in zip(found.prompt_logprobs[1:], unpruned.prompt_logprobs[1:], strict=True):
        for token, value in wanted.items():
            assert logprobs[token].logprob == pytest.approx(value.logprob, abs=1e-4)


def test_vllms_metrics_count_what_was_pruned(folders, reference):
    folder, shown = str(folders(FAMILY)), questions(FAMILY, 3)
    with running(folders(FAMILY), VTR, disable_log_stats=False) as engine:
        answers = engine.answer([*shown, Question(qwen_prompt("What is red?", 0))])
        counted = {
            name: REGISTRY.get_sample_value(f"vllm:vtr_{name}_total", {"model_name": folder, "engine": "0"})
            for name in COUNTERS
        }
    grids = reference.processor.image_processor([question.pictures[0] for question in shown])["image_grid_thw"]
    assert counted.pop(SECONDS) > 0
    assert counted == {
        REQUESTS: 3,
        BEFORE: sum(int(grid.prod()) // 4 for grid in grids),
        AFTER: sum(len(answer.kept[-1]) for answer in answers if answer.kept),
    }
