"""The small world in motion: its questions have the answers its clips show."""

import json
from collections import Counter

import pytest
import torch

import clips
import make_clips
import train_video
import world


def test_the_test_clips_are_what_their_maker_makes():
    asked, known = (json.loads((make_clips.FOLDER / f"test_{kind}.json").read_text()) for kind in "qa")
    made = [question for _, _, question in make_clips.samples()]
    assert [entry["question"] for entry in asked] == [question.text for question in made]
    assert [(entry["answer"], entry["type"]) for entry in known] == [(q.answer, q.family) for q in made]
    assert [entry["question_id"] for entry in asked] == [entry["question_id"] for entry in known]
    assert Counter(entry["type"] for entry in known) == dict.fromkeys(clips.FAMILIES, 40)
    videos = {file.stem for file in (make_clips.FOLDER / "videos").iterdir()}
    assert videos == {entry["video_name"] for entry in asked}
    assert sum(file.stat().st_size for file in make_clips.FOLDER.rglob("*") if file.is_file()) < 5e6


def test_test_and_training_clips_come_from_different_seeds(monkeypatch, student):
    seeds = [seed for _, seed, _ in make_clips.samples()]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < world.FIRST_TRAINING_SEED
    drawn, sample = [], clips.sample_clips
    monkeypatch.setattr(clips, "sample_clips", lambda count, seed: drawn.append(seed) or sample(count, seed))
    next(train_video.asked())
    student.lesson(1, world.FIRST_TRAINING_SEED, torch.device("cpu"))
    assert min(drawn) >= world.FIRST_TRAINING_SEED


def test_clips_are_the_same_for_the_same_seed_and_objects_keep_apart():
    one, two = clips.sample_clips(40, 3), clips.sample_clips(40, 3)
    assert torch.equal(one.scenes.centre, two.scenes.centre)
    assert torch.equal(one.render(1), two.render(1))
    assert (one.present.sum(1) >= 2).all()
    scenes = one.scenes
    distance = (scenes.centre[:, :, None] - scenes.centre[:, None]).norm(dim=-1)
    room = distance - scenes.radius[:, :, None] - scenes.radius[:, None]
    present = one.present.repeat_interleave(one.frames, 0)
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(clips.MAX_OBJECTS, dtype=torch.bool)
    assert room[pairs].min() > 0
    border = torch.minimum(scenes.centre, clips.SIDE - scenes.centre).amin(-1) - scenes.radius
    assert border[present].min() > -1e-3, "nothing leaves the picture"


@pytest.mark.parametrize("seed", range(6))
def test_answers_follow_from_what_the_frames_show(seed):
    clip = clips.sample_clips(1, seed)
    scenes, asked = clip.scenes, {q.text: q.answer for q in clips.questions(clip, 0)}
    shapes = [world.SHAPES[i] for i in scenes.shape[-1]]
    last = scenes.present[-1].nonzero().flatten().tolist()
    assert asked["How many objects are there?"] == world.NUMBERS[len(last)]
    [first] = scenes.present[0].nonzero().flatten().tolist()
    assert asked["Which shape appears first?"] == shapes[first]
    for k in last:
        told = asked.get(f"Which way does the {shapes[k]} move?")
        seen = scenes.present[:, k].nonzero().flatten()
        dx, dy = (scenes.centre[seen[-1], k] - scenes.centre[seen[0], k]).tolist()
        way = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert told in (None, way)
        assert len(seen) >= 4, "long enough to be seen moving"


def test_the_ground_of_a_clip_stays():
    clip = clips.sample_clips(2, 1)
    frames = clip.render(1)
    nothing = clips.Clips(
        world.Scenes(**vars(clip.scenes) | {"present": torch.zeros_like(clip.scenes.present)}),
        *(clip.present, clip.heading, clip.frames),
    )
    ground = nothing.render(1)
    assert (ground[:, 0] - ground[:, -1]).abs().mean() < 0.03 < (ground[0, 0] - ground[1, 0]).abs().mean()
    assert (frames - ground).abs().max() > 0.2
