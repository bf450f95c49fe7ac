"""What each whole Qwen-VL owes its users, checked on tiny random models.

A backbone's tests import everything from here and give a fixture `tiny`, a `Tiny`.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from engine_checks import STEPS, TOLERANCE, all_hooks, flop_counter, hiding
from torch import Tensor, nn

import strategy
from strategy import VTRConfig, clse
from strategy.kernels.kv_cache import length as cache_length
from strategy.kernels.kv_cache import read as cache_read

IMAGE, VIDEO, START, END = 70, 71, 72, 73
PATCH = 3 * 2 * 4 * 4  # numbers in a patch: channels, frames and a square of pixels
SHARES, CUTOFF = [0.6, 0.4, 0.2], 0.6
# On grids as small as these the default cutoff leaves the mean alone, whatever the grid's sides.
PRUNED = VTRConfig(retain_ratio=SHARES, clse_cutoff_ratio=CUTOFF)

# The parts of configurations that all tiny models have in common.
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {"num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "initializer_range": 0.15}
DEEPSTACK_VISION = VISION | {  # of Qwen3-VL
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}


class Tiny(Protocol):
    """A tiny random model; `stamp` is the number of text tokens before each frame of a video, 0 for none."""

    stamp: int

    def model(self, attention: str) -> Any:
        """The model, the same weights at each call, in float32."""


@dataclass
class Prompts:
    """A model's arguments; and for each sample the indices of its visual tokens, and their grids."""

    call: dict[str, Any]
    visual: list[Tensor]
    grids: list[list[tuple[int, int, int]]]

    @property
    def length(self) -> int:
        return self.call["input_ids"].shape[1]


# For each sample its parts: so much text, an image of so many rows and columns, a video of so many frames too.
PROMPTS = {
    "one image": [[12, (4, 6), 9]],
    "odd sides": [[5, (5, 7), 6]],
    "an image after a long text": [[80, (3, 8), 4]],
    "two images": [[4, (4, 6), 8, (7, 3), 5]],
    "a video": [[6, (3, 4, 5), 7]],
    "a video between two images": [[3, (3, 5), 2, (2, 4, 3), 3, (4, 4), 6]],
    "images of different size": [[20, (4, 6), 9], [3, (5, 7), 6]],
    "one sample without an image": [[4, (4, 6), 5], [50], [30, (5, 5), 2]],
}


def make(parts: list[list[Any]], stamp: int) -> Prompts:
    """Prompts as a processor would make them, padded on the left, of random text and pixels."""
    generator = torch.Generator().manual_seed(0)
    rows, visual, grids, patches = [], [], [], {IMAGE: [], VIDEO: []}

    def text(count: int) -> list[int]:
        return torch.randint(1, 60, (count,), generator=generator).tolist()

    for sample in parts:
        row, places, own = [], [], []
        for part in sample:
            if isinstance(part, int):
                row += text(part)
                continue
            kind, (frames, height, width) = (VIDEO, part) if len(part) == 3 else (IMAGE, (1, *part))
            own.append((frames, height, width))
            patches[kind].append((frames, 2 * height, 2 * width))
            apart = kind == VIDEO and stamp > 0
            for _ in range(frames if apart else 1):
                row += [*text(stamp if apart else 0), START]
                count = height * width * (1 if apart else frames)
                places += range(len(row), len(row) + count)
                row += [kind] * count + [END]
        rows.append(row)
        visual.append(torch.tensor(places).long())
        grids.append(own)
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    call = {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]),
    }
    for kind, pixels, name in ((IMAGE, "pixel_values", "image"), (VIDEO, "pixel_values_videos", "video")):
        if patches[kind]:
            call[pixels] = torch.randn(sum(map(math.prod, patches[kind])), PATCH, generator=generator)
            call[f"{name}_grid_thw"] = torch.tensor(patches[kind])
    return Prompts(call, [places + pad for places, pad in zip(visual, pads, strict=True)], grids)


@pytest.fixture(params=PROMPTS)
def prompts(request: pytest.FixtureRequest, tiny: Tiny) -> Prompts:
    return make(PROMPTS[request.param], tiny.stamp)


def generate(model: Any, prompts: Prompts, steps: int = STEPS) -> Any:
    """Greedily chosen text tokens, [B, steps], and the logits [B, steps, V] they were chosen from."""
    output = model.generate(
        **prompts.call,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=list(range(60, 80)),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, prompts.length :], torch.stack(output.logits, dim=1)


def greedy(logits: Tensor) -> Tensor:
    return logits[..., :60].argmax(-1)


@contextlib.contextmanager
def seen_positions(model: Any) -> Iterator[list[Tensor]]:
    """The positions in time, row and column, [3, B, L], of each call of the decoder."""
    seen = []

    def hook(decoder: nn.Module, args: Any, call: dict[str, Any]) -> None:
        given, batch = call["position_ids"], len(call["inputs_embeds"])
        seen.append(given[-3:] if given.dim() == 3 else given.expand(3, batch, -1))

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Oracle:
    """What the stock model makes of the whole text at once, with what is pruned hidden.

    logits: [B, STEPS, V]. positions: [3, B, L]. inputs, outputs: [B, L, C] of each layer, by itself.
    attention: [B, heads, L, L] of each layer.
    """

    logits: Tensor
    positions: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]
    attention: list[Tensor]


@torch.no_grad()
def ask_oracle(tiny: Tiny, prompts: Prompts, tokens: Tensor, stages: list[Any]) -> Oracle:
    """Run the stock model once over the prompts and all `tokens` but the last."""
    model, call, later = tiny.model("eager"), dict(prompts.call), tokens[:, :-1]
    decoder = model.model.language_model
    call["input_ids"] = torch.cat([call["input_ids"], later], dim=1)
    call["attention_mask"] = torch.cat([call["attention_mask"], torch.ones_like(later)], dim=1)
    told = {name: call.get(name) for name in ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(**told)
    inputs, outputs, attention = [], [], []
    handles = []
    for layer in decoder.layers:
        handles += [
            layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0])),
            layer.register_forward_hook(
                lambda layer, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            ),
            layer.self_attn.register_forward_hook(lambda module, args, out: attention.append(out[1])),
        ]
    try:
        with hiding(decoder, prompts.visual, call["attention_mask"].bool(), prompts.length, stages, {}):
            logits = model(**call, position_ids=positions, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return Oracle(logits[:, prompts.length - 1 :], positions, inputs, outputs, attention)


def chosen(oracle: Oracle, prompts: Prompts, layers: list[int], sample: int) -> list[Tensor]:
    """The visual tokens that are kept after each stage by the formulas of the paper, on the stock model's numbers."""
    places = prompts.visual[sample]
    left, kept = torch.arange(len(places)), []
    for layer, share in zip(layers, SHARES, strict=True):
        scores = oracle.attention[layer - 1][sample, :, prompts.length - 1, places].mean(0)
        if not kept:
            features = [tensor[None, sample, places] for tensor in (oracle.inputs[0], oracle.outputs[layer - 1])]
            sizes = [math.prod(grid) for grid in prompts.grids[sample]]
            parts = zip(prompts.grids[sample], *(t.split(sizes, 1) for t in (*features, scores[None])), strict=True)
            scores = torch.cat([clse.score(before, after, row, grid, CUTOFF)[0] for grid, before, after, row in parts])
        best = scores[left].topk(max(1, math.floor(share * len(places)))).indices
        left = left[best.sort().values]
        kept.append(left)
    return kept


@pytest.mark.pairs
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_is_the_stock_model_with_the_pruned_tokens_hidden(tiny, prompts, attention):
    model = tiny.model(attention)
    with strategy.prune(model, PRUNED) as run, seen_positions(model) as positions:
        tokens, logits = generate(model, prompts)
    oracle = ask_oracle(tiny, prompts, tokens, run.stages)
    torch.testing.assert_close(logits, oracle.logits, **TOLERANCE)
    assert torch.equal(tokens, greedy(oracle.logits))
    real = prompts.call["attention_mask"].bool()
    assert torch.equal(positions[0][:, real], oracle.positions[:, :, : prompts.length][:, real])
    assert torch.equal(torch.cat(positions[1:], dim=2), oracle.positions[:, :, prompts.length :])
    layers = [stage.layer for stage in run.stages]
    assert layers == [1, 4, 8]
    for sample, places in enumerate(prompts.visual):
        if len(places):
            for stage, kept in zip(run.stages, chosen(oracle, prompts, layers, sample), strict=True):
                assert torch.equal(stage.kept[sample], kept)


def test_generate_after_a_prune_before_the_first_layer_is_so_too(tiny, prompts):
    model = tiny.model("sdpa")
    config = VTRConfig(strategy="uniform", prune_layer=[0, 4, 8], retain_ratio=SHARES)
    with strategy.prune(model, config) as run:
        tokens, logits = generate(model, prompts)
    assert [stage.layer for stage in run.stages] == [0, 4, 8]
    torch.testing.assert_close(logits, ask_oracle(tiny, prompts, tokens, run.stages).logits, **TOLERANCE)


@torch.no_grad()
def test_all_that_an_answer_costs_is_counted_as_torch_counts_it(tiny, prompts):
    model, counted, seen = tiny.model("sdpa"), [], []
    with strategy.prune(model, PRUNED) as run:
        for steps in (1, 4):  # the second time some of it is remembered
            before = sum(run.multiply_adds.values())
            with flop_counter() as counter:
                generate(model, prompts, steps)
            counted.append(sum(run.multiply_adds.values()) - before)
            seen.append(counter.get_total_flops() / 2)
    assert counted == pytest.approx(seen, rel=0.01)
    assert counted[1] - counted[0] == pytest.approx(seen[1] - seen[0], rel=0.01), "of the later tokens alone"
    assert all(run.multiply_adds[part] > 0 for part in ("vision", "prefill", "scoring", "head", "decode"))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_second_prefill_of_priortr_is_one_without_the_question(tiny, padding):
    # Copies, since transformers 5 leaves hooks of its own on a model that told its attention.
    model, told, end = copy.deepcopy(tiny.model("eager")), copy.deepcopy(tiny.model("eager")), 7
    prompts, attention = make(PROMPTS["one image"], tiny.stamp), []
    model.generation_config.eos_token_id = [end, 9]
    ids, places = prompts.call["input_ids"].clone(), prompts.visual[0]
    ids[ids == end] = 8
    ids[0, -3] = end
    short, behind = torch.cat([ids[:, : places[-1] + 2], ids[:, -3:]], dim=1), int(places[-1]) + 1
    for given in (ids, short):
        call = prompts.call | {"input_ids": given, "attention_mask": torch.ones_like(given)}
        attention.append(told(**call, output_attentions=True, use_cache=False).attentions[3][0, :, :, places].mean(0))
    p, q = attention[0][behind:].mean(0), attention[1][-1]
    p, q = p / p.sum(), q / q.sum()
    expected = (p * (p / q).log()).topk(7).indices.sort().values
    fill = ids.new_full((1, 5), 9)
    parts = [fill, ids] if padding == "left" else [ids, fill]
    mask = torch.cat([torch.ones_like(part) * (part is ids) for part in parts], dim=1)
    call = prompts.call | {"input_ids": torch.cat(parts, dim=1), "attention_mask": mask}
    with strategy.prune(model, VTRConfig(strategy="priortr_2f", retain_ratio=7.5 / len(places), prune_layer=4)) as run:
        model(**call)
    assert torch.equal(run.stages[0].kept[0], expected)
    assert not torch.equal(attention[0][behind], q)


@pytest.mark.pairs
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_a_loop_by_hand_needs_no_positions(tiny, prompts, masked):
    model = tiny.model("sdpa")
    with strategy.prune(model, PRUNED):
        tokens, logits = generate(model, prompts)
        # Whoever calls the model itself has not prepared what generate leaves on the model.
        model.model.rope_deltas = None
        output = model(**prompts.call, use_cache=True)
        mask, steps = prompts.call["attention_mask"], [output.logits[:, -1]]
        for step in range(STEPS - 1):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(
                input_ids=tokens[:, step : step + 1],
                attention_mask=mask if masked else None,
                past_key_values=output.past_key_values,
            )
            steps.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, dim=1), logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_follows_generate_needs_no_positions(tiny, prompts):
    model = tiny.model("sdpa")
    options = {"do_sample": False, "suppress_tokens": list(range(60, 80)), "return_dict_in_generate": True}
    with strategy.prune(model, PRUNED):
        tokens, logits = generate(model, prompts)
        output = model.generate(**prompts.call, max_new_tokens=3, **options)
        last = model(input_ids=output.sequences[:, -1:], past_key_values=output.past_key_values).logits[:, -1]
    assert torch.equal(output.sequences[:, prompts.length :], tokens[:, :3])
    torch.testing.assert_close(last, logits[:, 3], rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_a_cache_the_same_tokens_are_kept(tiny, prompts):
    model, results = tiny.model("sdpa"), []
    for use_cache in (True, False):
        with strategy.prune(model, PRUNED) as run:
            logits = model(**prompts.call, use_cache=use_cache).logits
        results.append((logits, [kept for stage in run.stages for kept in stage.kept]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_every_layer_of_the_cache_holds_the_final_kept_set(tiny, prompts):
    model = tiny.model("sdpa")
    with torch.no_grad(), strategy.prune(model, PRUNED) as run:
        cache = model(**prompts.call, use_cache=True).past_key_values
    lost = [len(places) - len(kept) for places, kept in zip(prompts.visual, run.stages[-1].kept, strict=True)]
    lengths = {cache_read(cache, layer)[0].shape[2] for layer in range(12)}
    assert lengths == {cache_length(cache)} == {prompts.length - min(lost)}


@pytest.mark.pairs
@pytest.mark.parametrize("config", [VTRConfig(enabled=False), VTRConfig(retain_ratio=[1.0, 1.0, 1.0])])
def test_keeping_everything_is_the_stock_model_to_the_last_bit(tiny, prompts, config):
    model = tiny.model("sdpa")
    stock = generate(model, prompts)
    with strategy.prune(model, config) as run:
        tokens, logits = generate(model, prompts)
    assert torch.equal(logits, stock[1])
    assert torch.equal(tokens, stock[0])
    assert run.samples == sum(len(places) > 0 for places in prompts.visual)


@pytest.mark.parametrize("parts", [[[30]], [[30], [12]]])
def test_text_alone_is_the_stock_model_to_the_last_bit(tiny, parts):
    model, prompts = tiny.model("sdpa"), make(parts, tiny.stamp)
    stock = generate(model, prompts)
    with strategy.prune(model, VTRConfig()) as run:
        # A prompt with an image before it must leave nothing for it.
        generate(model, make(PROMPTS["one image"], tiny.stamp))
        tokens, logits = generate(model, prompts)
    assert torch.equal(logits, stock[1])
    assert torch.equal(tokens, stock[0])
    assert run.samples == 1


@pytest.mark.pairs
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_the_stock_one(tiny, prompts, fails):
    model = tiny.model("sdpa")
    hooks, stock = all_hooks(model), generate(model, prompts)[1]
    methods = {name: getattr(module, "forward") for name, module in model.named_modules()}  # noqa: B009

    def fail(*_: Any) -> None:
        raise KeyError("in the middle of a layer")

    layers = model.model.language_model.layers
    try:
        with strategy.prune(model, PRUNED):
            broken = layers[5].mlp.register_forward_hook(fail) if fails else None
            generate(model, prompts)
        assert not fails
    except KeyError:
        broken.remove()
    assert all_hooks(model) == hooks
    assert methods == {name: getattr(module, "forward") for name, module in model.named_modules()}  # noqa: B009
    assert torch.equal(generate(model, prompts)[1], stock)


def check_beams_and_samples(model: Any, prompts: Prompts, run: strategy.RunRecord, rows: int) -> None:
    """Two beams and two samples of each prompt, in so many rows, start from the pruned prompt of the greedy tokens."""
    tokens, _ = generate(model, prompts)
    after = [stage.after for stage in run.stages]
    beams = model.generate(**prompts.call, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert beams.shape == (rows, prompts.length + 4)
    assert [stage.after for stage in run.stages] == [2 * count for count in after]
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1e-4, "suppress_tokens": list(range(60, 80))}
    sampled = model.generate(**prompts.call, max_new_tokens=4, num_return_sequences=2, **options)
    assert torch.equal(sampled[::2, prompts.length :], tokens[:, :4])
    assert torch.equal(sampled[1::2, prompts.length :], tokens[:, :4])


def test_generation_of_every_kind_runs(tiny):
    model, prompts = tiny.model("sdpa"), make(PROMPTS["images of different size"], tiny.stamp)
    with strategy.prune(model, PRUNED) as run:
        check_beams_and_samples(model, prompts, run, rows=4)
        uncached = model.generate(**prompts.call, max_new_tokens=2, do_sample=False, use_cache=False)
        assert uncached.shape == (2, prompts.length + 2)


@torch.no_grad()
def test_a_later_call_is_not_asked_for_its_layout(tiny):
    model, prompts = tiny.model("sdpa"), make(PROMPTS["one image"], tiny.stamp)
    with strategy.prune(model, PRUNED):
        cache = model(**prompts.call, use_cache=True).past_key_values
        token, grids = torch.tensor([[IMAGE]]), prompts.call["image_grid_thw"]
        logits = model(input_ids=token, image_grid_thw=grids, past_key_values=cache).logits
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_a_layout_serves_one_call(tiny):
    model, prompts = tiny.model("sdpa"), make(PROMPTS["one image"], tiny.stamp)
    embeddings = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    stock = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    with strategy.prune(model, PRUNED):
        model(**prompts.call)
        hidden = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    assert torch.equal(hidden, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prunes_too(tiny, dtype):
    model, prompts = copy.deepcopy(tiny.model("sdpa")).to(dtype), make(PROMPTS["two images"], tiny.stamp)
    with strategy.prune(model, PRUNED) as run:
        logits = generate(model, prompts)[1]
    assert torch.isfinite(logits).all()
    assert [stage.after for stage in run.stages] == [27, 18, 9]


@torch.no_grad()
def test_a_second_question_goes_on_from_the_pruned_cache(tiny, prompts):
    model = tiny.model("sdpa")
    options = {"do_sample": False, "suppress_tokens": list(range(60, 80)), "return_dict_in_generate": True}
    question = torch.tensor([[5, 6, 7, 8]]).expand(len(prompts.visual), -1)
    with strategy.prune(model, PRUNED) as run:
        first, again = (model.generate(**prompts.call, max_new_tokens=3, **options) for _ in range(2))
        ids = torch.cat([first.sequences, question], dim=1)
        mask = torch.cat([prompts.call["attention_mask"], torch.ones(len(ids), 7, dtype=torch.long)], dim=1)
        # The pictures are in the cache, so they are not given again.
        call = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        second = model.generate(**call, max_new_tokens=STEPS, **options)
        prefills = run.samples
        # By hand, what the cache does not hold yet: the last token of the answer, then the question.
        token, cache, expected = ids[:, -5:], again.past_key_values, []
        for _ in range(STEPS):
            token = greedy(model(input_ids=token, past_key_values=cache).logits[:, -1:])
            expected.append(token)
    assert torch.equal(second.sequences[:, ids.shape[1] :], torch.cat(expected, dim=1))
    assert cache_length(second.past_key_values) == cache_length(cache)
    assert prefills == 2 * sum(len(places) > 0 for places in prompts.visual)


def test_prompts_and_grids_must_match(tiny):
    model, prompts = tiny.model("sdpa"), make(PROMPTS["two images"], tiny.stamp)
    call, grids = prompts.call, prompts.call["image_grid_thw"]
    embeddings = model.get_input_embeddings()(call["input_ids"])
    with torch.no_grad(), strategy.prune(model, VTRConfig()):
        for wrong, words in [
            ({"input_ids": None, "inputs_embeds": embeddings}, "pass input_ids"),
            ({"image_grid_thw": grids[:1]}, "image_grid_thw: the prompts hold more visual tokens"),
            ({"image_grid_thw": grids.flip(0)}, r"are not the 24 of a frame of grid \(1, 4, 6\)"),
        ]:
            with pytest.raises(ValueError, match=words):
                model(**call | wrong)
    assert all_hooks(model) == 0


def planned(model_class: Any, config: Any) -> tuple[int, ...]:
    """The layers at which a model of that configuration, without weights, is pruned by default."""
    with torch.device("meta"):
        model = model_class(config)
    with strategy.prune(model, VTRConfig()) as run:
        return run.plan.layers
