"""The clutter world: its questions have the answers its pictures show, and a strided choice cannot see them."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import load_dataset
from documents import ROOT, table
from PIL import Image
from test_shapes import SmallStudent
from torch.nn import functional as F
from training_checks import options

import clutter
import glyphs
import make_clutter
import make_questions
import train_clutter
import train_llava
import training
import world
from strategy.baselines import strided

GRID = (24, 24)


@pytest.fixture(scope="module")
def scenes():
    return clutter.sample_scenes(100, 7)


def asked(scenes, number=None):
    numbers = range(len(scenes.present)) if number is None else [number]
    return [(index, question) for index in numbers for question in clutter.questions(scenes, index)]


def test_the_test_set_is_what_its_maker_makes(monkeypatch):
    stored = load_dataset("parquet", data_files=str(make_clutter.SET.file))["train"]
    assert {picture.size for picture in stored["image"]} == {(world.SIDE, world.SIDE)}
    first = next(make_questions.rows(make_clutter.SET))["image"]["bytes"]
    drawn = Image.open(io.BytesIO(first))
    assert np.abs(np.asarray(stored[0]["image"], float) - np.asarray(drawn, float)).mean() < 1
    monkeypatch.setattr(clutter, "render", lambda *_: torch.zeros(1, 3, 8, 8))  # the others would take half a minute
    stored = stored.remove_columns("image").to_list()
    made = make_questions.rows(make_clutter.SET)
    assert stored == [{name: value for name, value in row.items() if name != "image"} for row in made]
    assert Counter(row["family"] for row in stored) == dict.fromkeys(clutter.FAMILIES, 80)
    assert make_clutter.SET.file.stat().st_size < 5e6
    counts = Counter(row["answer"] for row in stored if row["family"] == "count")
    assert set(counts) == set(world.NUMBERS)
    assert min(counts.values()) >= 5


def test_things_do_not_touch_and_cover_a_few_per_cent(scenes):
    assert torch.equal(scenes.centre, clutter.sample_scenes(100, 7).centre)
    few = clutter.sample_scenes(2, 7)
    assert torch.equal(clutter.render(few, 1), clutter.render(few, 1))
    apart = (scenes.centre[:, :, None] - scenes.centre[:, None]).abs()
    room = (apart - scenes.extent[:, :, None] - scenes.extent[:, None]).amax(-1)
    pairs = scenes.present[:, :, None] & scenes.present[:, None] & ~torch.eye(len(clutter.KIND), dtype=torch.bool)
    assert room[pairs].min() > 0
    covered = (4 * scenes.extent.prod(-1) * scenes.present).sum(1) / world.SIDE**2
    assert 0.01 < covered.min() < covered.mean() < 0.04


def test_answers_follow_from_the_scene(scenes):
    colours = list(clutter.COLOURS)
    for index, question in asked(scenes):
        texts = [clutter.TEXTS[scenes.text[index, k]] for k in question.things]
        names = [colours[scenes.colour[index, k]] for k in question.things]
        assert scenes.present[index, list(question.things)].all()
        if question.family in {"number", "word"}:
            assert ([question.answer], names[0] in question.text) == (texts, True)
        elif question.family == "larger":
            assert question.answer == names[0 if int(texts[0]) > int(texts[1]) else 1]
        elif question.family == "count":
            [name] = set(names) or {question.text.split()[2]}
            dots = (clutter.KIND == 2) & scenes.present[index] & (scenes.colour[index] == colours.index(name))
            assert question.text == f"How many {name} dots are there?"
            assert question.answer == world.NUMBERS[int(dots.sum())]
        else:
            column, row = (scenes.centre[index, question.things[0]] // (world.SIDE / 3)).int().tolist()
            assert question.answer == world.PLACES[row * 3 + column]
            assert question.text == f"Where is the {'number' if texts[0].isdigit() else 'word'} {texts[0]}?"
    assert {question.family for _, question in asked(scenes)} == set(clutter.FAMILIES)


def test_a_picture_shows_each_text_on_its_plate():
    scenes = clutter.sample_scenes(6, 3)
    pictures = clutter.render(scenes, 3)
    bitmaps = glyphs.bitmaps([text.upper() for text in clutter.TEXTS])
    for scene, k in (scenes.present & (scenes.text >= 0)).nonzero().tolist():
        cell, (x, y) = scenes.cell[scene, k], scenes.centre[scene, k]
        columns = bitmaps.shape[2] if clutter.KIND[k] == 1 else glyphs.WIDTH + 2
        rows = (torch.arange(glyphs.HEIGHT) - (glyphs.HEIGHT - 1) / 2) * cell + y
        across = (torch.arange(columns - 2) - (columns - 3) / 2) * cell + x
        seen = pictures[scene][:, rows.long()][:, :, across.long()].mean(0)
        bright = (seen > (seen.min() + seen.max()) / 2).float()
        same = [(bright == each[1:-1, 1 : columns - 1]).float().mean() for each in bitmaps]
        kind = range(10) if clutter.KIND[k] == 0 else range(10, len(bitmaps))
        # Light ink on a dark plate, or the other way round.
        best = max(kind, key=lambda text: abs(same[text] - 0.5))
        assert best == scenes.text[scene, k]


def test_patches_are_labelled_with_what_they_show(scenes):
    labels = clutter.patch_labels(scenes, GRID)
    for scene, k in scenes.present[:20].nonzero().tolist():
        x, y = (scenes.centre[scene, k] / (world.SIDE / GRID[0])).long().tolist()
        at = y * GRID[1] + x
        told = {name: int(values[scene, at]) - 1 for name, values in labels.items()}
        assert told == {
            "shape": int(clutter.KIND[k]),
            "colour": int(scenes.colour[scene, k]),
            "text": int(scenes.text[scene, k]),
            "place": int(world.cells(scenes)[scene, k]),
            "centre": 0,
        }
    assert torch.equal(labels["centre"].sum(1), scenes.present.sum(1))
    assert {name: int(values.max()) for name, values in labels.items()} == {
        name: classes - 1 for name, classes in clutter.LABELS.items()
    }


def unseen(scenes, count):
    """The share of questions, by family, of which a strided choice of so many tokens shows some thing nowhere."""
    kept = strided((1, *GRID), count, "cpu")
    seen = (clutter.shares(scenes, GRID)[..., kept] > 0).any(-1)
    misses = {}
    for index, question in asked(scenes):
        if question.things:
            misses.setdefault(question.family, []).append(not seen[index, list(question.things)].all())
    return {family: sum(missed) / len(missed) for family, missed in misses.items()}


def test_a_strided_choice_does_not_see_what_is_asked_about(scenes):
    few, many = unseen(scenes, 64), unseen(scenes, 192)
    assert min(few["number"], few["larger"], few["count"]) > 0.5
    assert many["count"] > 0.5
    assert all(many[family] <= few[family] for family in few)
    assert unseen(scenes, 576) == dict.fromkeys(clutter.FAMILIES, 0)


def test_the_readme_has_these_figures():
    scenes = clutter.sample_scenes(400, 0)
    rows = table(ROOT / "examples/clutter/README.md", "| tokens | number")
    for row in rows:
        count, *shares = (float(cell) for cell in row.strip("|").split("|"))
        misses = unseen(scenes, int(count))
        assert shares == [round(misses[family], 2) for family in clutter.FAMILIES]
    assert len(rows) == 3
    text = " ".join((ROOT / "examples/clutter/README.md").read_text().split())
    covered = (4 * scenes.extent.prod(-1) * scenes.present).sum(1).mean() / world.SIDE**2
    shown = (clutter.patch_labels(scenes, GRID)["shape"] > 0).float().mean()
    assert f"cover {100 * covered:.1f} % of a picture, and {100 * shown:.1f} % of its 24 x 24 patches" in text
    patches = (clutter.shares(scenes, GRID) > 0).sum(-1)
    needed = {family: [] for family in clutter.FAMILIES}
    for index, question in asked(scenes):
        needed[question.family].append(int(patches[index, list(question.things)].sum()))
    means = {family: f"{sum(each) / len(each):.1f} ({family})" for family, each in needed.items()}
    assert ", ".join(means[family] for family in ("number", "word", "larger", "place")) in text.replace(
        " patches of these", ""
    )
    assert means["count"] in text


def test_larger_pictures_are_alike():
    scenes = clutter.sample_scenes(8, 2, (448, 600))
    extent = torch.tensor([600, 448])
    inside = (scenes.centre - scenes.extent >= 0) & (scenes.centre + scenes.extent <= extent)
    assert inside[scenes.present].all()
    pictures = clutter.render(scenes, 2)
    assert pictures.shape == (8, 3, 448, 600)
    assert F.avg_pool2d(pictures, 56).std() > 0.02


class SmallClutterStudent(train_clutter.ClutterStudent, SmallStudent):
    """A small student of this world."""


def test_training_teaches_this_world_and_writes_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "options", lambda *_, **__: options(tmp_path))
    lessons, draw = [], training.Run._draw
    monkeypatch.setattr(training.Run, "_draw", lambda *given: lessons.append(draw(*given)) or lessons[-1])
    train_llava.main(SmallClutterStudent, None)
    assert set(lessons[0].labels) == set(clutter.LABELS)
    assert {question.family for lesson in lessons for each in lesson.asked for question in each} == set(
        clutter.FAMILIES
    )
    assert (tmp_path / "checkpoint/model.safetensors").exists()
