"""Pictures that stay bytes until they move to the model's device: the numbers are those of the stock processor.

A Qwen's tests import everything from here and give a fixture `processors`: the stock one, and one by `keep_bytes`.
"""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, BatchFeature

from qwen_vl_vtr.colours import PIXELS, ColourBatch, keep_bytes

CHECKPOINTS = Path(__file__).parents[1] / "examples/shapes/checkpoints"


def processors_of(checkpoint):
    stock, own = (AutoProcessor.from_pretrained(CHECKPOINTS / checkpoint) for _ in range(2))
    keep_bytes(own)
    return stock, own


def picture(size, seed, mode="RGB"):
    colours = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)).byte()
    return Image.fromarray(colours.numpy()).convert(mode)


def prepared(processor, pictures, **more):
    message = [{"role": "user", "content": [*[{"type": "image"}] * len(pictures), {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return processor(text=text, images=pictures or None, return_tensors="pt", **more)


def bytes_held(batch):
    return vars(batch)["_state"][0][PIXELS].dtype == torch.uint8


def alike(ours, stock):
    return list(ours) == list(stock) and all(torch.equal(ours[name], stock[name]) for name in stock)


@given(
    sizes=st.lists(st.tuples(st.integers(28, 300), st.integers(28, 300)), min_size=1, max_size=3),
    again=st.integers(0, 2),
    resize=st.booleans(),
    grouping=st.sampled_from([None, False]),  # whether pictures of one size are prepared apart, as on a CPU
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_on_the_device_they_are_the_stock_pixel_values(processors, sizes, again, resize, grouping):
    stock, own = processors
    sizes = [*sizes, *sizes[:again]]
    # What has been resized before is handed over in whole cells, as by qwen_vl_utils.
    cell = stock.image_processor.patch_size * stock.image_processor.merge_size
    sizes = sizes if resize else [(max(1, wide // cell) * cell, max(1, high // cell) * cell) for wide, high in sizes]
    pictures = [picture(size, seed) for seed, size in enumerate(sizes)]
    options = {"do_resize": resize, "disable_grouping": grouping}
    expected, batch = (prepared(processor, pictures, **options) for processor in (stock, own))
    assert isinstance(batch, ColourBatch)
    half = copy.copy(batch).to("cpu", torch.float16)
    assert bytes_held(batch)
    assert batch.to("cpu") is batch, "as the library's"
    assert not bytes_held(batch)
    assert alike(batch, expected)
    assert alike(half, expected.to(torch.float16))


@pytest.mark.parametrize(
    "options", [{"patch_size": 8}, {"do_rescale": False}, {"do_normalize": False}, {"temporal_patch_size": 1}]
)
def test_options_of_a_call_hold_on_the_device_too(processors, options):
    pictures = [picture((224, 336), 0), picture((300, 200), 1)]
    expected, batch = (prepared(processor, pictures, **options) for processor in processors)
    assert alike(batch.to("cpu"), expected)


def bytes_alive():
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor and each.dtype == torch.uint8)


def test_pictures_of_a_batch_that_is_gone_are_gone(processors):
    gc.collect()
    gc.disable()
    try:
        before = bytes_alive()
        batch = prepared(processors[1], [picture((90, 60), 0), picture((60, 60), 1)])
        assert bytes_alive() > before
        del batch
        assert bytes_alive() == before
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_the_same_pixel_values(processors):
    stock, own = processors
    pictures = [picture((224, 336), 0), picture((300, 200), 1)]
    moved = prepared(own, pictures).to("cuda")
    assert all(tensor.is_cuda for tensor in moved.values())
    assert torch.equal(moved[PIXELS].cpu(), prepared(stock, pictures)[PIXELS])


@pytest.mark.parametrize(
    "read",
    [
        lambda batch: batch[PIXELS],
        lambda batch: dict(**batch)[PIXELS],
        lambda batch: dict(batch.items())[PIXELS],
        lambda batch: batch.pixel_values,
        lambda batch: batch.data[PIXELS],
        lambda batch: copy.deepcopy(batch)[PIXELS],
        lambda batch: pickle.loads(pickle.dumps(batch))[PIXELS],
        lambda batch: batch.to(torch.float32)[PIXELS],
        lambda batch: batch.copy()[PIXELS],
        lambda batch: (batch | {"other": 1})[PIXELS],
        lambda batch: batch.convert_to_tensors("pt")[PIXELS],
        lambda batch: batch.pop(PIXELS),
    ],
)
def test_whoever_reads_a_batch_where_it_is_reads_floats(processors, read):
    stock, own = processors
    assert torch.equal(read(prepared(own, [picture((90, 60), 0)])), prepared(stock, [picture((90, 60), 0)])[PIXELS])


def test_a_batch_may_be_changed(processors):
    batch = prepared(processors[1], [picture((60, 60), 0)])
    names = set(batch)
    batch[PIXELS] = None
    assert batch[PIXELS] is None
    del batch[PIXELS]
    assert set(batch.to("cpu")) == names - {PIXELS}


FORMS = {
    "one picture": lambda: picture((60, 90), 0),
    "an array": lambda: np.array(picture((60, 90), 0)),
    "a tensor": lambda: torch.from_numpy(np.array(picture((60, 90), 0))).permute(2, 0, 1),
    "lists of pictures": lambda: [[picture((60, 90), 0)]],
}


@pytest.mark.parametrize("form", FORMS)
def test_pictures_in_other_forms_are_prepared_as_always(processors, form):
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processors[0].apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    batches = [processor(text=text, images=FORMS[form](), return_tensors="pt") for processor in processors]
    assert type(batches[1]) is BatchFeature
    assert alike(batches[1], batches[0])


OTHERS = ([], [picture((60, 60), 0, "L")], [picture((60, 90), 0), picture((90, 60), 1, "RGBA")])


@pytest.mark.parametrize("pictures", OTHERS)
def test_other_pictures_are_prepared_as_always(processors, pictures):
    stock, own = processors
    batch = prepared(own, pictures)
    assert type(batch) is BatchFeature
    assert alike(batch, prepared(stock, pictures))


def test_a_processor_without_the_step_is_left_as_it_is(processors):
    stock, _ = processors
    slow = copy.deepcopy(stock)
    slow.image_processor = object()
    kind = type(slow)
    keep_bytes(slow)
    assert type(slow) is kind


def test_threads_may_share_a_processor(processors):
    stock, own = processors
    pictures = [picture((56 + 28 * (seed % 4), 84), seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        moved = [*pool.map(lambda each: prepared(own, [each]).to("cpu"), pictures)]
    for ours, each in zip(moved, pictures, strict=True):
        assert torch.equal(ours[PIXELS], prepared(stock, [each])[PIXELS])
