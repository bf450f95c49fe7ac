"""What the models of the benchmarks owe whoever measures them.

A backbone's tests import everything from here and give a fixture `backbone_name`, as `benchmarks.models` has it.
"""

import json
import logging
import math
import warnings

import pytest
import torch
from matrix import runs_on

import strategy
from benchmarks import answers, curves, speed
from benchmarks.command_line import numbers
from benchmarks.models import BACKBONES, Case, batched, build, preparation, resized, sizes_of
from benchmarks.settings import VARIED
from benchmarks.tower import replayed, vision_calls
from strategy import VTRConfig
from strategy.backbone import find_backbone

# At full size: weights in thousand millions as published, or their sum over the parts, and tokens of the prompt.
FULL = {
    "llava": (7.06, 576, 651),
    "video": (7.37, 2056, 2123),
    "qwen2": (8.29, 1296, 1351),
    "qwen3": (8.77, 1296, 1351),
}
NEW = 5


@pytest.fixture(scope="module")
def case(backbone_name) -> Case:
    return build(backbone_name, "cpu", torch.float32, small=True)


def answered(case: Case, inputs, **knobs):
    """The new tokens [B, NEW] of a greedy answer."""
    said = case.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, **knobs)
    return said[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else said


def received(case: Case, inputs):
    """What the first layer of the decoder is given, [B, L, C]."""
    seen = []
    layer = find_backbone(case.model, None).decoder(case.model).layers[0]
    handle = layer.register_forward_pre_hook(
        lambda _, args, call: seen.append(args[0] if args else call["hidden_states"]), with_kwargs=True
    )
    try:
        case.model.generate(**inputs, do_sample=False, max_new_tokens=1)
    finally:
        handle.remove()
    return seen[0]


def test_an_answer_has_as_many_tokens_as_asked_and_nothing_warns(case, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # its records go no further up
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert answered(case, case.inputs).shape == (1, NEW)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_the_decoder_receives_the_tokens_that_the_case_says(case):
    one = received(case, case.inputs)
    assert one.shape[:2] == (1, case.tokens)
    first, second = received(case, batched(case, 2))
    torch.testing.assert_close(first, one[0])
    assert int((first != second).any(-1).sum()) == case.visual, "what depends on the pixels are the visual tokens"


def test_a_batch_is_copies_of_the_prompt_with_pixels_of_their_own(case):
    alone, together = batched(case, 1), batched(case, 3)
    torch.testing.assert_close(alone, case.inputs, rtol=0, atol=0)
    assert answered(case, together).shape == (3, NEW)
    samples = received(case, together)
    assert samples.shape[:2] == (3, case.tokens)
    assert all(not torch.equal(samples[a], samples[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("name", strategy.available())
def test_every_strategy_prunes_it_where_it_does_by_default(case, name):
    if not runs_on(case.model, name):
        pytest.skip("the backbone does not describe its vision tower")
    with strategy.prune(case.model, VTRConfig(strategy=name, keep_tokens=64)) as run:
        assert answered(case, batched(case, 2)).shape == (2, NEW)
        assert run.stages[-1].after < 2 * case.visual


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_all_is_finite(backbone_name, dtype):
    case = build(backbone_name, "cpu", dtype, small=True)
    assert {parameter.dtype for parameter in case.model.parameters()} == {dtype}
    said = case.model.generate(
        **case.inputs, do_sample=False, max_new_tokens=NEW, output_scores=True, return_dict_in_generate=True
    )
    assert len(said.scores) == NEW
    assert all(scores.isfinite().all() and scores.std() > 0 for scores in said.scores)


def test_the_same_weights_and_pixels_come_each_time_and_no_random_number_is_taken_from_others(backbone_name, case):
    before = torch.random.get_rng_state()
    again = build(backbone_name, "cpu", torch.float32, small=True)
    batched(again, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    mine, its = case.model.state_dict(), again.model.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    torch.testing.assert_close(again.inputs, case.inputs, rtol=0, atol=0)


def test_the_full_size_is_that_of_the_published_model(backbone_name):
    case = build(backbone_name, "meta", torch.float16)
    weights, visual, tokens = FULL[backbone_name]
    assert sum(parameter.numel() for parameter in case.model.parameters()) == pytest.approx(weights * 1e9, rel=1e-3)
    assert {parameter.dtype for parameter in case.model.parameters()} == {torch.float16}
    assert (case.visual, case.tokens) == (visual, tokens)
    tensors = [*case.model.parameters(), *case.model.buffers(), *case.inputs.values()]
    assert {one.device.type for one in tensors if torch.is_tensor(one)} == {"meta"}


def test_another_backbone_is_refused():
    with pytest.raises(ValueError, match=r"'bert': allowed are " + ", ".join(BACKBONES)):
        build("bert", "cpu", torch.float32)


def test_a_run_prints_tables_writes_its_files_and_goes_on_from_what_it_kept(
    backbone_name, tmp_path, capsys, monkeypatch
):
    budgets = "0.334,0.112" if backbone_name.startswith("qwen") else "64,32"
    asked = ["--backbone", backbone_name, "--budget", budgets, "--device", "cpu", "--batches", "1,2"]
    asked += ["--repeats", "1", "--new", "3", "--output", str(tmp_path)]
    with monkeypatch.context() as context:
        context.setattr(speed, "free_method_prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            speed.main(asked)
    [part] = tmp_path.iterdir()
    assert len(json.loads(part.read_text())["rows"]) == 8
    calls = []
    monkeypatch.setattr(speed, "measure_row", lambda *args, **call: calls.append(args))
    speed.main(asked)
    assert not calls
    printed = capsys.readouterr().out
    assert printed.index("| pruned") < printed.index("decisions of the graph engine:")
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".png"]
    [file] = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert [row["batch"] for row in found["rows"]] == [1] * 6 + [2] * 2
    unpruned, *pruned = found["ways"].values()
    assert len(pruned) == 2
    for graph, told in zip(found["rows"][3:6:2], pruned, strict=True):
        assert graph["held"] == told["kept_bytes"]
        assert told["first_difference"] is None
        assert 0 < told["floor"] <= unpruned["floor"]
        assert told["free"] > 0


def interrupted(*_):
    raise KeyboardInterrupt


def test_prompts_are_prepared_from_files_as_the_case_has_them(backbone_name, case, tmp_path):
    prepared = preparation(backbone_name, case)
    files = [tmp_path / f"{number}{prepared.suffix}" for number in range(3)]
    for file, seed in zip(files, (0, 1, 0), strict=True):
        prepared.write(file, seed)
    assert files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()
    inputs, expected = prepared.prepare(files[:2]), batched(case, 2)
    assert inputs.keys() == expected.keys()
    for name, value in inputs.items():
        if isinstance(value, list) or value.is_floating_point():
            assert [each.shape for each in value] == [each.shape for each in expected[name]]
        else:
            assert value.tolist() == expected[name].tolist()
    first, second = received(case, inputs)
    assert int((first != second).any(-1).sum()) == case.visual, "what depends on the file are the visual tokens"


def test_answers_from_files_are_the_same_in_each_run_and_an_interrupted_run_goes_on(
    backbone_name, tmp_path, capsys, monkeypatch
):
    budget = "0.112" if backbone_name.startswith("qwen") else "32"
    asked = ["--backbone", backbone_name, "--budget", budget, "--device", "cpu", "--batches", "1,2"]
    asked += ["--prompts", "3", "--new", "4", "--workers", "2", "--output", str(tmp_path)]
    measured, measure_row = [], answers.measure_row

    def measure(name, bench, files, batch, **options):
        measured.append((name, batch, len(files)))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure_row(name, bench, files, batch, **options)

    monkeypatch.setattr(answers, "measure_row", measure)
    with pytest.raises(KeyboardInterrupt):
        answers.main(asked)
    [part] = tmp_path.iterdir()
    assert len(json.loads(part.read_text())["rows"]) == 2
    answers.main(asked)
    ways = ["unpruned eager", "unpruned graph", f"pruned {budget} graph"]
    first_run = [(way, 1, 3) for way in ways]
    assert measured == [*first_run, first_run[2], *((way, 2, 4) for way in ways)]
    table, report = sorted(tmp_path.iterdir(), key=lambda file: file.suffix, reverse=True)
    assert table.read_text() in capsys.readouterr().out
    found = json.loads(report.read_text())
    alone, together = found["rows"][:3], found["rows"][3:]
    for row in alone + together:
        assert f"| {row['name']} " in table.read_text()
        assert all(row[rate] > 0 for rate in ("ahead", "one_thread", "prepared"))
        assert all(row[part] > 0 for part in ("host", "vision", "prefill", "decode", "other", "floor"))
        parts = sum(row[part] for part in ("vision", "prefill", "decode", "other"))
        assert parts == pytest.approx(1000 / row["prepared"])
        assert row["differing"] == 0
        assert all(len(answer.split()) <= 4 for answer in row["answers"])
    assert any(len(set(row["answers"])) > 1 for row in alone + together), "so another order would be seen"
    for rows, prompts in ((alone, 3), (together, 4)):
        unpruned, graph, pruned = rows
        assert unpruned["answers"] == graph["answers"]
        assert len(pruned["answers"]) == prompts
        assert pruned["floor"] < graph["floor"] == unpruned["floor"]
    assert all(0 < row["first"] <= row["first_99"] for row in alone)
    assert all(math.isnan(row["first"]) and math.isnan(row["first_99"]) for row in together)


def test_a_prompt_of_another_size_has_as_many_visual_tokens_as_asked(backbone_name, case):
    # Pictures by their visual tokens; of a small video two frames have 2 x 4.
    expected = {"visual": (16, 16), "frames": (4, 16)}
    assert sizes_of(backbone_name) == (list(expected) if backbone_name.startswith("qwen") else [])
    for what in sizes_of(backbone_name):
        size, visual = expected[what]
        other = resized(backbone_name, case, what, size)
        assert other.visual == visual
        first, second = received(case, batched(other, 2))
        assert len(first) == other.tokens
        assert int((first != second).any(-1).sum()) == visual


def test_answers_are_the_same_where_the_visual_tokens_are_made_only_once(backbone_name, case):
    ran = []
    for each in (case, *(resized(backbone_name, case, what, 16) for what in sizes_of(backbone_name))):
        inputs = batched(each, 2)
        config = VTRConfig(keep_tokens=64, engine="graph")
        with strategy.prune(case.model, config):
            wanted = answered(case, inputs)
        calls = vision_calls(each, inputs)
        ran.clear()
        handles = [next(call.module.children()).register_forward_hook(lambda *_: ran.append(1)) for call in calls]
        with replayed(each, calls), strategy.prune(case.model, config):
            for _ in range(2):
                assert torch.equal(answered(case, inputs), wanted)
        assert not ran
        with strategy.prune(case.model, config):
            assert torch.equal(answered(case, inputs), wanted)
        assert ran, "afterwards the tower runs again"
        for handle in handles:
            handle.remove()


def curve_words(backbone_name, vary, folder):
    budgets = "0.334" if backbone_name.startswith("qwen") else "32"
    words = f"--backbone {backbone_name} --vary {vary} --budget {budgets} --device cpu --repeats 1 --new 3 --output"
    return [*words.split(), str(folder)]


def test_all_curves_are_measured_and_drawn(backbone_name, tmp_path, capsys):
    for vary in ("batch", "budget", *sizes_of(backbone_name)):
        curves.main(curve_words(backbone_name, vary, tmp_path / vary))
        points, table, picture = sorted(
            (tmp_path / vary).iterdir(), key=lambda file: (".json", ".md", ".png").index(file.suffix)
        )
        assert table.read_text() in capsys.readouterr().out
        assert picture.stat().st_size > 1000
        found = json.loads(points.read_text())
        values = numbers(VARIED[vary].small, float)
        by_way = {}
        for point in found["points"]:
            assert not point["failure"]
            assert all(point[key] > 0 for key in ("prefill", "prefill_floor", "decode", "decode_floor", "cache"))
            assert point["visual"] > 0
            by_way.setdefault(point["way"], []).append(point)
        unpruned, pruned = by_way.values()
        assert [point["value"] for point in pruned] == values
        assert [point["value"] for point in unpruned] == ([1] if vary == "budget" else values)
        assert [tower["value"] for tower in found["towers"]] == ([1] if vary == "budget" else values)
        assert all(tower["floor"] > 0 and tower["time"] > 0 for tower in found["towers"])
        for whole, less in zip(unpruned, pruned, strict=vary != "budget"):
            assert less["batch"] == whole["batch"]
            assert less["prefill_floor"] <= whole["prefill_floor"]
            assert less["cache"] <= whole["cache"]


def test_points_of_a_curve_that_fail_are_told_and_no_larger_one_is_tried(backbone_name, tmp_path, capsys, monkeypatch):
    measure_point, tried = curves.measure_point, []

    def measure(way, value, *args, **options):
        tried.append((way, value))
        if way == "unpruned" and value >= 2:
            raise torch.cuda.OutOfMemoryError
        if len(tried) == 5:
            raise KeyboardInterrupt
        return measure_point(way, value, *args, **options)

    monkeypatch.setattr(curves, "measure_point", measure)
    words = [*curve_words(backbone_name, "batch", tmp_path), "--no_tower", "--values"]
    with pytest.raises(KeyboardInterrupt):
        curves.main([*words, "2,3,1"])
    way = tried[1][0]
    assert tried == [("unpruned", 2), (way, 2), (way, 3), ("unpruned", 1), (way, 1)]
    printed = capsys.readouterr().out
    assert "unpruned, 2: not measured, does not fit into memory" in printed
    assert "unpruned, 3: not measured, does not fit into memory, as 2 does not" in printed
    [file] = tmp_path.glob("*.json")
    assert [point["value"] for point in json.loads(file.read_text())["points"]] == [2, 2, 3, 3, 1]
    kept = file.rename(tmp_path / "kept.json")
    curves.main([*words, "1"])
    capsys.readouterr()
    curves.main(["--plot", str(kept), str(file)])
    rows = [
        line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| unpruned", f"| {way}"))
    ]
    assert [int(row[2]) for row in rows] == [1, 1, 2, 2, 3, 3]
    assert [bool(row[4].strip()) for row in rows] == [True, True, False, True, False, True]
