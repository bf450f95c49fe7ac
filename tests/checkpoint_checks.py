"""What every backbone owes whoever brings a checkpoint: the weights that are in it, or one sentence.

The tests of a backbone import everything from here and give two fixtures: `checkpoint`, the folder of a small
checkpoint, and `load`, which loads what is in a folder and returns the model's tensors by name.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from strategy.evaluation import checkpoint_files


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the small checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="session")
def loaded(checkpoint, load) -> dict[str, torch.Tensor]:
    """The tensors of the small checkpoint as they are loaded."""
    return load(checkpoint)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def write(folder, weights, kind):
    """Replace the weights in a folder by others, in one file or in two with an index."""
    for file in (*folder.glob("*.safetensors*"), *folder.glob("*.bin*")):
        file.unlink()
    stem, ending = ("model", "safetensors") if "safetensors" in kind else ("pytorch_model", "bin")
    names = sorted(weights)
    parts = {f"{stem}.{ending}": names}
    if kind.startswith("sharded"):
        parts = {f"{stem}-0000{n + 1}-of-00002.{ending}": names[n::2] for n in range(2)}
        index = {name: file for file, own in parts.items() for name in own}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, own in parts.items():
        part = {name: weights[name].clone() for name in own}
        if ending == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})


def edit(folder, part=None, **values):
    """Change values of config.json, or of a part of it; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def refusal(load, folder):
    """The sentence with which a checkpoint is refused."""
    with pytest.raises((ValueError, SystemExit)) as stop:
        load(folder)
    said = str(stop.value)
    assert "\n" not in said
    return said


def same(one, other):
    """Whether two sets of tensors are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def bare(name):
    """A tensor's name without what transformers puts before old names."""
    return name.removeprefix("model.").removeprefix("language_model.")


KINDS = ["safetensors", "sharded safetensors", "bin", "sharded bin"]
PARTS = {
    "visual features' way to the decoder": r"(visual\.merger|mm_projector)\..*weight",
    "head": r"lm_head\.weight",
    "final norm": r"^model\.(language_model\.)?norm\.weight",
    "embeddings": r"embed_tokens\.weight",
    "one MLP tensor": r"^model.*layers\.7\.mlp\.up_proj\.weight",
    "a norm in a layer": r"^model.*layers\.11\.post_attention_layernorm\.weight",
    "a whole layer": r"^model\.(language_model\.)?layers\.3\.",
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_any_format_are_the_same_weights(load, copy, loaded, kind):
    write(copy, weights_of(copy), kind)
    assert same(load(copy), loaded)


@pytest.mark.pairs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_is_missing_is_named(load, copy, part, kind):
    weights = weights_of(copy)
    lost = [name for name in weights if re.search(part, name)]
    write(copy, {name: weights[name] for name in set(weights) - set(lost)}, kind)
    said = refusal(load, copy)
    assert f"{copy}: the weights do not fit config.json: missing [" in said
    named = re.findall(r"'([^']*)'", said)
    assert len(named) == min(len(lost), checkpoint_files.NAMED) > 0
    assert {bare(name) for name in named} <= {bare(name) for name in lost}
    assert len(lost) <= checkpoint_files.NAMED or f"and {len(lost) - checkpoint_files.NAMED} more" in said


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_over_or_of_another_shape_is_named(load, copy, kind):
    weights = weights_of(copy)
    write(copy, weights | {"score.weight": torch.zeros(2, 128)}, kind)
    assert "left over ['score.weight']" in refusal(load, copy)
    [name] = [name for name in weights if re.search(r"^model.*layers\.5\.mlp\.down_proj", name)]
    turned = weights[name].T.contiguous()
    write(copy, weights | {name: turned}, kind)
    shapes = f"{tuple(turned.shape)}, not {tuple(weights[name].shape)}"
    assert f"layers.5.mlp.down_proj.weight is {shapes}" in refusal(load, copy)


def add_files_of_a_training_run(folder):
    torch.save({"step": 5, "name": "Adam"}, folder / "training_args.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "scheduler.bin").write_bytes(b"no weights at all")
    (folder / "trainer_state.json").write_text("[]")
    (folder / "log_history.json").write_text('[{"loss": 1.0}]')
    (folder / "all_results.json").write_text("{")


def add_second_weights(folder):
    save_file({"x": torch.zeros(1)}, folder / "adapter.safetensors", {"format": "pt"})
    save_file({"x": torch.zeros(1)}, folder / "a_first.safetensors", {"format": "pt"})
    (folder / "z_last.safetensors").write_bytes(b"no weights")


def add_a_leftover_index(folder):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin.index.json").write_text("[1]")


def add_bin(folder):
    weights = {name: torch.zeros_like(tensor) for name, tensor in weights_of(folder).items()}
    torch.save(weights, folder / "pytorch_model.bin")


BESIDE = [add_files_of_a_training_run, add_second_weights, add_a_leftover_index, add_bin]


@pytest.mark.parametrize("add", BESIDE, ids=lambda add: add.__name__)
def test_files_that_transformers_ignores_are_ignored(load, copy, loaded, add):
    add(copy)
    assert same(load(copy), loaded)


def test_files_of_a_training_run_beside_bin_are_ignored(load, copy, loaded):
    write(copy, weights_of(copy), "bin")
    add_files_of_a_training_run(copy)
    assert same(load(copy), loaded)


def lose_a_shard(folder):
    write(folder, weights_of(folder), "sharded safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_the_shards(folder):
    weights = weights_of(folder)
    add_a_leftover_index(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def lie_about_a_shard(folder):
    write(folder, weights_of(folder), "sharded safetensors")
    file = folder / "model-00001-of-00002.safetensors"
    part = load_file(file)
    save_file({name: part[name] for name in list(part)[1:]}, file, {"format": "pt"})


def repeat_a_tensor(folder):
    write(folder, weights_of(folder), "sharded bin")
    one, two = (torch.load(folder / f"pytorch_model-0000{n}-of-00002.bin") for n in (1, 2))
    torch.save(two | dict([next(iter(one.items()))]), folder / "pytorch_model-00002-of-00002.bin")


def break_index(text):
    def spoil(folder):
        write(folder, weights_of(folder), "sharded bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)

    return spoil


def save_no_tensors(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"step": 5}, folder / "pytorch_model.bin")


def save_under_another_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def spoil_text(name, text):
    return lambda folder: (folder / name).write_text(text)


SPOILED_FILES = {
    "a lost shard": (lose_a_shard, "model-00002-of-00002.safetensors: missing, and model.safetensors.index.json names"),
    "a leftover index": (lose_the_shards, "model-00001-of-00002.safetensors: missing, .* a leftover to be deleted"),
    "a lying index": (lie_about_a_shard, r"00001-of-00002.safetensors: other tensors than its index says: missing \["),
    "a tensor twice": (repeat_a_tensor, r"00002-of-00002.bin: other tensors than its index says: in another file"),
    "an index that is a list": (break_index("[1]"), r"pytorch_model.bin.index.json: missing, or not JSON of names"),
    "an empty index": (break_index("{}"), r"pytorch_model.bin.index.json: want a weight_map"),
    "an index of numbers": (
        break_index('{"weight_map": {"a": 1}}'),
        r"pytorch_model.bin.index.json: want a weight_map",
    ),
    "no tensors": (save_no_tensors, "pytorch_model.bin: damaged, cut off, or more than tensors"),
    "another name": (save_under_another_name, "copy: no weights in this folder, want one of model.safetensors, "),
    "a list": (spoil_text("tokenizer_config.json", "[1]"), "tokenizer_config.json: missing, or not JSON of names"),
    "broken JSON": (spoil_text("generation_config.json", "[]]"), "generation_config.json: missing, or not JSON"),
    "deep JSON": (spoil_text("added_tokens.json", "[" * 100000), "added_tokens.json: missing, or not JSON"),
    "LoRA": (spoil_text("adapter_config.json", "{}"), "copy: LoRA checkpoints are not supported"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED_FILES.values(), ids=SPOILED_FILES)
def test_files_that_cannot_be_right_are_one_sentence(load, copy, spoil, words):
    spoil(copy)
    assert re.search(words, refusal(load, copy))
