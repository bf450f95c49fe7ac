"""Which decoders are fused, and which layers give attention rows, by a trial of the stock layers at `attach`."""

import copy
from typing import Any

import pytest
import torch
import transformers
from engine_checks import TEXT
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import strategy
from qwen_vl_vtr import QwenBackbone
from strategy import Backbone, Span, VTRConfig, backbone
from strategy.attach import attachment_of
from strategy.kernels.layer_check import TOKENS, try_layers
from strategy.kernels.llama_layer import fusion_blocker

SIDE, IMAGE = 6, 63
OTHER = "the fused layer computes other numbers than the stock layer"
# By name: the kind of text decoder, what its configuration has besides TEXT, and why it is not fused.
DECODERS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("Llama", {}, None),
    "qwen3": ("Qwen3", {"head_dim": 16}, None),
    "granite as a llama": ("Granite", {"attention_multiplier": 0.25, "logits_scaling": 8.0}, None),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078},
        f"a GraniteDecoderLayer ({OTHER})",
    ),
    "granite's residuals": ("Granite", {"attention_multiplier": 0.25, "residual_multiplier": 0.9}, OTHER),
    "granite's embeddings": (
        "Granite",
        {"attention_multiplier": 0.25, "embedding_multiplier": 2.0},
        "a GraniteModel (it changes hidden states between its layers or in front of them)",
    ),
    "cohere2": ("Cohere2", {"sliding_window": 128}, "a Cohere2DecoderLayer with another norm (Cohere2LayerNorm)"),
    "some layers do not rotate": ("SmolLM3", {"pad_token_id": 0, "no_rope_layer_interval": 4}, OTHER),
    "rotates neighbours": ("Helium", {"head_dim": 16}, f"a HeliumDecoderLayer ({OTHER})"),
    "further norms": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 128},
        "a parameter that its description does not name (pre_feedforward_layernorm.weight)",
    ),
    "two thetas": ("Gemma3Text", {"head_dim": 16}, "a Gemma3DecoderLayer with a parameter that its description does"),
    "a window out of sight": ("Mistral", {"head_dim": 16}, "its configuration has sliding_window=4096, which no layer"),
}
cases = pytest.mark.parametrize(("kind", "more", "reason"), DECODERS.values(), ids=DECODERS.keys())


class Wrapped(Backbone):
    """A LLaVA with any text decoder, whose layers are described by default."""

    name = "wrapped"
    models = (LlavaForConditionalGeneration,)
    decoders = ()
    nominal_tokens = 576
    greedy_loop = QwenBackbone.greedy_loop

    def decoder(self, model):
        return model.model.language_model

    def entry(self, model):
        return model.model

    def layout(self, model, kwargs):
        if kwargs.get("pixel_values") is None:
            return None
        rows = kwargs["input_ids"] == IMAGE
        return [[Span(int(row.nonzero()[0]), (1, SIDE, SIDE))] for row in rows]

    def rotary(self, layer, kwargs):
        return kwargs.get("position_embeddings", kwargs.get("position_embeddings_global"))


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setattr(backbone, "_backbones", dict(backbone._backbones))
    strategy.register_backbone(Wrapped())
    return Wrapped()


def llava(kind: str, more: dict[str, Any], attention: str = "sdpa") -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=4
    )
    text = getattr(transformers, f"{kind}Config")(**TEXT | more)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that weights of norms show
            parameter.data.uniform_(0.5, 1.5)
    return model


def prompt() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (1, 50), generator=generator)
    ids[:, 5 : 5 + SIDE**2] = IMAGE
    pixels = torch.randn(1, 3, 24, 24, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def answer(model: Any) -> torch.Tensor:
    return model.generate(**prompt(), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


@cases
def test_a_decoder_is_fused_only_if_that_computes_the_same(kind, more, reason):
    model = llava(kind, more)
    stock = answer(model)
    if reason is None:
        with strategy.prune(model, VTRConfig(enabled=False, engine="graph")) as run:
            assert torch.equal(answer(model), stock)
        assert not run.graph_report()
        return
    with pytest.raises(ValueError, match=r"^engine=graph: .* cannot be fused; allowed here are engine=eager") as error:
        strategy.attach(model, VTRConfig(engine="graph"))
    assert reason in str(error.value)
    with strategy.prune(model, VTRConfig(enabled=False)):
        assert reason in attachment_of(model).generator.policy.blocker
        assert torch.equal(answer(model), stock)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "granite as a llama", "granite", "rotates neighbours"])
def test_half_precision_changes_nothing(family, name, dtype, attention):
    kind, more, reason = DECODERS[name]
    decoder = llava(kind, more, attention).to(dtype).model.language_model
    blocker = try_layers(decoder, family.layer_specs(decoder), family, fused=True).blocker
    assert blocker == reason or reason in blocker


@cases
def test_attention_is_refused_where_its_rows_would_be_wrong(kind, more, reason):
    model = llava(kind, more)
    wrong = kind in ("Cohere2", "SmolLM3", "Helium", "Gemma3Text")
    config = VTRConfig(keep_tokens=[20, 12, 5], prune_layer=[1, 4, 8], ref_layers=0, engine="eager")
    with strategy.prune(model, config) as run:
        if wrong:
            words = f"a {kind.removesuffix('Text')}DecoderLayer caches other keys than the layer_spec and rotary"
            with pytest.raises(ValueError, match=words):
                answer(model)
        else:
            answer(model)
            assert [stage.after for stage in run.stages] == [20, 12, 5]
    with strategy.prune(model, VTRConfig(strategy="divprune", keep_tokens=5)) as run:
        answer(model)
    assert run.stages[0].after == 5


def test_layers_that_rotate_may_give_rows_beside_some_that_do_not():
    kind, more, _ = DECODERS["some layers do not rotate"]
    model = llava(kind, more)
    with strategy.prune(model, VTRConfig(strategy="fastv", keep_tokens=5, prune_layer=3)) as run:
        answer(model)
    assert run.stages[0].after == 5
    config = VTRConfig(strategy="fastv", keep_tokens=5, prune_layer=4)
    with strategy.prune(model, config), pytest.raises(ValueError, match="SmolLM3DecoderLayer caches other keys"):
        answer(model)


def counted(decoder: nn.Module, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Which modules of a kind run."""
    plain, ran = kind.forward, []

    def forward(self, x):
        ran.append(self)
        return plain(self, x)

    monkeypatch.setattr(kind, "forward", forward)
    return ran


@pytest.mark.parametrize(("name", "layers"), [("llama", {0}), ("some layers do not rotate", {0, 3})])
def test_one_layer_of_each_kind_runs_once(family, monkeypatch, name, layers):
    decoder = llava(*DECODERS[name][:2]).model.language_model
    ran = counted(decoder, type(decoder.layers[0].mlp), monkeypatch)
    try_layers(decoder, family.layer_specs(decoder), family, fused=False)
    assert len(ran) == len(layers)
    assert {number for number, layer in enumerate(decoder.layers) if layer.mlp in ran} == layers


@pytest.mark.parametrize("training", [False, True])
def test_a_trial_leaves_nothing_behind_and_nobody_sees_it(training):
    model = llava(*DECODERS["llama"][:2]).train(training)
    model.model.language_model.layers[2].eval()
    seen = []
    handles = [module.register_forward_hook(lambda *_: seen.append(1)) for module in model.modules()]
    handles += [module.register_forward_pre_hook(lambda *_: seen.append(1)) for module in model.modules()]
    modules = [(module, dict(vars(module)), dict(module._forward_hooks)) for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    run = strategy.attach(model, VTRConfig(enabled=False, engine="graph"))
    strategy.detach(model)
    assert not seen
    assert torch.equal(torch.get_rng_state(), random)
    assert (run.prompts, run.graph_report(), run.means()["multiply_adds"]["prefill"]) == (0, "", 0)
    for module, attributes, hooks in modules:
        assert vars(module) == attributes
        assert module._forward_hooks == hooks
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failed_trial_is_a_reason_and_leaves_nothing_behind(monkeypatch):
    model = llava(*DECODERS["llama"][:2])
    kind = type(model.model.language_model.layers[0].self_attn)
    with monkeypatch.context() as context:
        context.setattr(kind, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ValueError, match=r"\(trying its layers raised ZeroDivisionError: division by zero\)"):
            strategy.attach(model, VTRConfig(engine="graph"))
        strategy.attach(model, VTRConfig())
        strategy.detach(model)
    assert not any("forward" in vars(module) for module in model.modules())
    with strategy.prune(model, VTRConfig(engine="graph", keep_tokens=5)):
        answer(model)


@pytest.mark.parametrize("how", ["meta", "sharded", "split"])
def test_layers_out_of_reach_are_not_tried(family, monkeypatch, how):
    decoder = copy.deepcopy(llava(*DECODERS["granite"][:2]).model.language_model)
    specs = family.layer_specs(decoder)
    if how == "meta":
        decoder.layers[-1].to("meta")
    elif how == "sharded":
        next(decoder.layers.parameters()).ds_shape = (1,)
    else:
        decoder.layers[0].mlp.down_proj.mp_group = object()
    ran = counted(decoder, type(decoder.layers[0].mlp), monkeypatch)
    assert try_layers(decoder, specs, family, fused=True) == (specs, None)
    assert not ran
    assert (fusion_blocker(decoder.layers, specs) is None) == (how == "split")


@pytest.mark.parametrize("window", [1, 2, TOKENS])
def test_a_trial_fits_into_any_window(family, window):
    decoder = llava("Qwen2", {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 3})
    decoder = decoder.model.language_model
    specs = family.layer_specs(decoder)
    assert {spec.window for spec in specs} == {None, window}
    assert try_layers(decoder, specs, family, fused=True) == (specs, None)


def test_weights_that_overflow_are_no_difference(family):
    decoder = llava(*DECODERS["llama"][:2]).half().model.language_model
    decoder.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    assert try_layers(decoder, family.layer_specs(decoder), family, fused=True).blocker is None
