"""What the training of the small Qwen checkpoints owes: it teaches the model that stock transformers runs.

The tests of a backbone import everything from here and give a fixture `student`, a function that builds an
untrained one in a working folder.
"""

import pytest
import torch
from training_checks import check_that_a_stopped_run_goes_on

import qwen_student
import training
import world

QUESTION = "Where is the star?"


def test_the_student_is_the_stock_model_with_its_processor(student, tmp_path):
    teach = student(tmp_path).eval()
    for parameter in teach.parameters():
        parameter.data.mul_(1.5)  # an untrained model's answers hardly depend on its pictures
    size = teach.sizes[3]
    pictures = world.render(world.sample_scenes(2, 5, size), 5)
    message = [
        {"role": "system", "content": qwen_student.SYSTEM},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    ]
    text = teach.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = teach.processor(
        text=[text] * 2, images=list(pictures), return_tensors="pt", do_rescale=False, do_resize=False
    )
    packed = training.pack(teach, [[world.Question("place", QUESTION, "left")]] * 2, "cpu")
    grid = teach.grid(size)
    with torch.no_grad():
        kept = torch.arange(grid[0] * grid[1]).expand(2, -1)
        taught = teach.answer(teach.encode(pictures), grid, kept, packed)
        stock = type(teach.model)(teach.model.config).eval()
        stock.load_state_dict(teach.model.state_dict())
        expected = stock(**inputs).logits[:, -1]
    first = int((packed.target[0] != training.IGNORED).nonzero()[0])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(taught[:, first], expected, rtol=0, atol=1e-4)


@pytest.fixture
def few_layers(monkeypatch):
    """As many layers as the training looks into."""
    monkeypatch.setitem(qwen_student.DECODER, "num_hidden_layers", 3)


@pytest.mark.usefixtures("few_layers")
def test_a_stopped_training_goes_on_to_the_same_weights(student, tmp_path, monkeypatch):
    # Small pictures of two shapes.
    monkeypatch.setattr(qwen_student.QwenStudent, "grids", ((7, 8), (8, 7)))
    check_that_a_stopped_run_goes_on(student, tmp_path, monkeypatch)


def test_the_checkpoint_is_small_and_brings_no_code(student, tmp_path):
    student(tmp_path).export(tmp_path / "checkpoint")
    files = list((tmp_path / "checkpoint").iterdir())
    assert sum(file.stat().st_size for file in files) < 16e6
    assert not [file for file in files if file.suffix == ".py"]
