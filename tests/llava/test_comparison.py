"""Comparisons and `look` with LLaVA."""

import csv

import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import PICTURE, QUESTION, Asked
from lmms_checks import CHECKPOINTS, task_manager
from PIL import Image

import strategy
from comparison import compare
from comparison.lmms import Lmms
from comparison.published import published_lines


@pytest.fixture
def asked():
    return Asked("llava_vtr", "shapes-llava", "shapes", PICTURE, QUESTION)


def test_published_figures_are_of_tasks_and_strategies_that_there_are():
    lines = published_lines()
    assert {line["task"] for line in lines} <= set(task_manager("llava_vtr").all_subtasks)
    assert {line["strategy"] for line in lines} <= set(strategy.available())
    named = [(line["model"], line["task"], line["strategy"], line["budget"]) for line in lines]
    assert len(named) == len(set(named))


def test_calibrated_runs_keep_as_many_tokens_in_the_mean_layer(type_, tmp_path):
    words = ["--strategies", "fastv", "--budgets", 200, "--calibrate", "tokens", "--examples", 0]
    type_(compare.main, *words, "--tasks", "shapes", "--limit", 1, "--output", tmp_path)
    folder = tmp_path / "llava_vtr/shapes"
    assert "calibrated" in (folder / "report.html").read_text()
    _, fastv = csv.DictReader((folder / "table.csv").open())
    assert fastv["budget"] == "200"
    assert float(fastv["kept_tokens_1"]) < 200, "two layers see all tokens"
    assert abs(float(fastv["tokens_per_layer"]) - 200) <= 2


def test_look_opens_a_file_as_a_data_set_does(tmp_path):
    exif, picture = Image.Exif(), Image.new("RGBA", (60, 30), (255, 0, 0, 0))
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    evaluator = Lmms("llava_vtr", str(CHECKPOINTS / "shapes-llava"), "device=cpu", None)
    [shown] = evaluator.inspect_one(str(tmp_path / "turned.png"), QUESTION, {"keep_tokens": 192}).frames
    # The turned picture is high, so grey borders stand left and right of what is transparent, and so white.
    middle = shown.width // 2
    assert shown.getpixel((middle, 2)) == shown.getpixel((middle, middle)) == (255, 255, 255)
    assert shown.getpixel((2, middle)) != (255, 255, 255)


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b"text", "cannot identify image file")])
def test_look_names_a_file_that_is_no_picture(tmp_path, content, words):
    file = tmp_path / "x.png"
    if content:
        file.write_bytes(content)
    evaluator = Lmms("llava_vtr", str(CHECKPOINTS / "shapes-llava"), "device=cpu", None)
    with pytest.raises(ValueError, match=f"^--image {file}: {words}"):
        evaluator.inspect_one(str(file), QUESTION, {"keep_tokens": 192})
