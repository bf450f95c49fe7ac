"""The small world: its questions have the answers its pictures show, and training can be taken up again."""

import argparse
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from training_checks import check_that_a_stopped_run_goes_on
from transformers import CLIPVisionConfig

import make_questions
import train_llava
import training
import world

TASKS = Path(__file__).parents[2] / "examples/shapes/tasks"


@pytest.mark.parametrize("test", make_questions.SETS, ids=lambda test: test.file.stem)
def test_a_test_set_is_what_its_maker_makes(test):
    stored = load_dataset("parquet", data_files=str(test.file))["train"]
    sizes = {picture.size for picture in stored["image"]}
    stored = stored.remove_columns("image")
    made = [{name: value for name, value in row.items() if name != "image"} for row in make_questions.rows(test)]
    assert stored.to_list() == made
    assert Counter(stored["family"]) == dict.fromkeys(world.FAMILIES, 80)
    assert test.file.stat().st_size < 5e6
    assert len(sizes) > 150 if test.varied else sizes == {(world.SIDE, world.SIDE)}
    answers = Counter(row["answer"] for row in made if row["family"] == "exists")
    assert min(answers["yes"], answers["no"]) > 30, "balanced"


def test_test_and_training_pictures_come_from_different_seeds(monkeypatch):
    seeds = []
    sample = world.sample_scenes
    monkeypatch.setattr(world, "sample_scenes", lambda *given: seeds.append(given[1]) or sample(*given))
    for test in make_questions.SETS:
        list(make_questions.rows(test))
    assert len(seeds) == len(set(seeds)), "the tasks share no scene"
    assert max(seeds) < world.FIRST_TRAINING_SEED
    student = argparse.Namespace(subject=world, sizes=[(336, 336), (280, 420)])
    student.lesson = lambda *drawn: training.Student.lesson(student, *drawn)
    student.grid = lambda size: (4, 4)
    run = argparse.Namespace(options=argparse.Namespace(batch=1, device="cpu"), student=student)
    seeds.clear()
    for stage in (0, 1):
        training.Run._draw(run, stage, 0)
    assert min(seeds) >= world.FIRST_TRAINING_SEED


@pytest.mark.parametrize("size", [(336, 336), (392, 616)])
def test_scenes_are_the_same_for_the_same_seed_and_apart(size):
    one, two = world.sample_scenes(50, 3, size), world.sample_scenes(50, 3, size)
    assert torch.equal(one.centre, two.centre)
    assert torch.equal(world.render(one, 1), world.render(two, 1))
    assert (one.present.sum(1) >= 3).all()
    distance = (one.centre[:, :, None] - one.centre[:, None]).norm(dim=-1)
    room = distance - one.radius[:, :, None] - one.radius[:, None]
    pairs = one.present[:, :, None] & one.present[:, None] & ~torch.eye(world.MAX_OBJECTS, dtype=torch.bool)
    assert room[pairs].min() >= world.GAP - 1e-3


def test_a_picture_shows_its_objects_colours_at_their_places():
    scenes = world.sample_scenes(20, 8)
    pictures = world.render(scenes, 8)
    palette = torch.tensor(list(world.COLOURS.values()))
    solid = scenes.present & (scenes.shape != world.SHAPES.index("ring"))
    for scene, place in solid.nonzero().tolist():
        x, y = scenes.centre[scene, place].long().tolist()
        seen = pictures[scene, :, y - 2 : y + 3, x - 2 : x + 3].mean(dim=(1, 2))
        assert int((palette - seen).norm(dim=1).argmin()) == scenes.colour[scene, place]


@pytest.mark.parametrize("seed", range(4))
def test_answers_follow_from_the_scene(seed):
    scenes = world.sample_scenes(1, seed)
    present = scenes.present[0]
    shapes = [world.SHAPES[i] for i in scenes.shape[0][present]]
    colours = [list(world.COLOURS)[i] for i in scenes.colour[0][present]]
    asked = {question.text: question.answer for question in world.questions(scenes, 0)}
    assert asked["How many objects are there?"] == world.NUMBERS[len(shapes)]
    for shape in world.SHAPES:
        assert asked[f"How many {world.plural(shape)} are there?"] == world.NUMBERS[shapes.count(shape)]
        single = f"What colour is the {shape}?"
        assert (single in asked) == (shapes.count(shape) == 1)
        assert single not in asked or asked[single] == colours[shapes.index(shape)]
    for index, (shape, colour) in enumerate(zip(shapes, colours, strict=True)):
        column, row = (scenes.centre[0][present][index] // 112).int().tolist()
        told = asked.get(f"Where is the {shape}?")
        assert told in (
            None,
            {(1, 0): "top", (0, 1): "left", (1, 1): "centre", (2, 1): "right", (1, 2): "bottom"}.get((column, row)),
        )
        article = "an" if colour == "orange" else "a"
        assert asked[f"Is there {article} {colour} {shape}?"] == "yes"


def test_chosen_questions_are_spread_over_families():
    scenes = world.sample_scenes(30, 5)
    chosen = [q for i in range(30) for q in world.choose(list(world.questions(scenes, i)), 5, random.Random(i))]
    assert len(chosen) == len(set(chosen)) or len(chosen) == 150
    assert min(Counter(question.family for question in chosen).values()) > 15


def test_packed_questions_see_the_picture_and_themselves_only():
    packed = training.Packed(
        *torch.tensor([[[5, 0, 0, -100], [6, 1, 0, 7], [5, 0, 1, -100], [0, 0, -1, -100]]]).unbind(-1)
    )
    seen = packed.mask(before=2)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


class SmallStudent(train_llava.LlavaStudent):
    """As many modules of each kind as it takes, for a test that trains."""

    visual_width = 48
    tower_config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    decoder_config = train_llava.DECODER | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    def student(folder):
        return SmallStudent(train_llava.load_tokenizer(folder, train_llava.asked))

    check_that_a_stopped_run_goes_on(student, tmp_path, monkeypatch)
