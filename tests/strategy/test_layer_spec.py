"""What a layer's description decides: which layers are fused, what they cost, and where their weights are."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from strategy.kernels import llama_layer
from strategy.kernels.attention import attention_rows
from strategy.kernels.layer_facts import pair_cost, token_cost, tp_group_of
from strategy.kernels.layer_spec import llama_spec

WIDTH, HEADS, KEY_HEADS, HEAD, INNER = 16, 4, 2, 6, 20


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Attention(nn.Module):
    head_dim = HEAD

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, KEY_HEADS * HEAD), nn.Linear(WIDTH, KEY_HEADS * HEAD)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(INNER, WIDTH, bias=False), nn.SiLU()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(WIDTH), RMSNorm(WIDTH)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(2))


def test_a_llama_layer_is_recognised(layers):
    spec = llama_spec(layers[0])
    assert (spec.head_width, spec.scale, spec.attention, spec.window) == (HEAD, HEAD**-0.5, "full", None)
    assert (spec.query_norm, spec.down) == (None, "mlp.down_proj")
    assert llama_layer.fusion_blocker(layers, [spec] * 2) is None
    assert llama_layer.layer_shape(layers[0], spec)[:3] == (HEADS, KEY_HEADS, HEAD)
    assert tp_group_of(layers) is None


def test_a_window_norms_and_experts_are_recognised(layers):
    attention = layers[0].self_attn
    attention.sliding_window, attention.scaling, attention.q_norm, attention.k_norm = 8, 0.5, RMSNorm(6), RMSNorm(6)
    layers[0].mlp = nn.Identity()
    spec = llama_spec(layers[0])
    assert (spec.attention, spec.window, spec.scale) == ("window", 8, 0.5)
    assert (spec.query_norm, spec.key_norm, spec.gate, spec.activation) == (
        *("self_attn.q_norm", "self_attn.k_norm"),
        *(None, None),
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention": "linear"}, "a Layer with linear attention"),
        ({"norm": "layer"}, "a Layer with another norm (layer)"),
        ({"rotary": "interleaved"}, "a Layer with another rotary embedding (interleaved)"),
        ({"gate": None}, "a Layer without plain linear projections"),
        ({"output": "self_attn.q_proj"}, "a Layer with biases behind its attention"),
        ({"query": "self_attn.wq"}, "a Layer without self_attn.wq, which its description names"),
        ({"post_attention_norm": None}, "a Layer without a norm in front of its MLP"),
        (
            {"up": "mlp.gate_proj"},
            "a Layer with a parameter that its description does not name (mlp.up_proj.weight)",
        ),
        ({"activation": nn.GELU()}, "an activation other than SiLU (GELU)"),
        ({"window": 8, "attention": "window"}, None),
    ],
)
def test_what_the_fused_layers_cannot_express_is_named(layers, given, words):
    specs = [llama_spec(layers[0]), replace(llama_spec(layers[1]), **given)]
    found = llama_layer.fusion_blocker(layers, specs)
    assert found is None if words is None else found.startswith(words)


def test_a_parameter_beside_the_described_modules_blocks_fusing(layers):
    specs = [llama_spec(layer) for layer in layers]
    layers[1].self_attn.sinks = nn.Parameter(torch.zeros(HEADS))
    found = llama_layer.fusion_blocker(layers, specs)
    assert found == "a Layer with a parameter that its description does not name (self_attn.sinks)"


def test_the_epsilon_of_a_norm_may_have_either_name(layers):
    norm = layers[0].input_layernorm
    norm.eps = norm.__dict__.pop("variance_epsilon") * 3
    assert llama_spec(layers[0]).epsilon == pytest.approx(3e-6)


class LayerNorm(RMSNorm):
    """A norm of another kind."""


def test_a_norm_of_another_kind_is_called_by_its_name(layers):
    layers[0].input_layernorm = LayerNorm(WIDTH)
    del layers[0].post_attention_layernorm
    spec = llama_spec(layers[0])
    assert (spec.norm, spec.post_attention_norm) == ("LayerNorm", None)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("self_attn.k_proj", "no self_attn.k_proj, so"),
        (
            "self_attn",
            "no self_attn.head_dim, self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, so",
        ),
        ("input_layernorm", "no input_layernorm with an epsilon, so"),
    ],
)
def test_an_unknown_layer_is_told_what_to_write(layers, missing, named):
    path, _, name = missing.rpartition(".")
    delattr(layers[0].get_submodule(path), name)
    with pytest.raises(
        ValueError, match=rf"^a Layer has {named}.* let layer_spec of its Backbone return strategy\.Layer"
    ):
        llama_spec(layers[0])


def test_a_layer_may_have_its_parts_anywhere(layers):
    """Attention rows, costs and packing read the paths of the description alone."""
    layer, spec = layers[0], llama_spec(layers[0])
    hidden, angles = torch.randn(1, 7, WIDTH), torch.rand(1, 7, HEAD)
    at = torch.tensor([[6]])
    expected = attention_rows(layer, spec, hidden, at, (angles.cos(), angles.sin()), None, None)
    costs = token_cost(layer, 0), pair_cost(layer, spec)
    assert costs[1] == 2 * HEADS * HEAD
    moved = nn.Module()
    moved.mix, moved.norm_in = layer.self_attn, layer.input_layernorm
    moved.feed, moved.norm_out = layer.mlp, layer.post_attention_layernorm
    paths = {"query": "mix.q_proj", "key": "mix.k_proj", "value": "mix.v_proj", "output": "mix.o_proj"}
    paths |= {"gate": "feed.gate_proj", "up": "feed.up_proj", "down": "feed.down_proj"}
    other = replace(spec, **paths, input_norm="norm_in", post_attention_norm="norm_out")
    assert torch.equal(attention_rows(moved, other, hidden, at, (angles.cos(), angles.sin()), None, None), expected)
    assert (token_cost(moved, 0), pair_cost(moved, other)) == costs
    before = {name: parameter.clone() for name, parameter in moved.named_parameters()}
    moved_layers = nn.ModuleList([moved])
    weights = llama_layer.pack_projections(moved_layers, [other])
    assert torch.equal(weights[0].qkv[: HEADS * HEAD], layer.self_attn.q_proj.weight)
    assert weights[0].gate_up.data_ptr() == layer.mlp.gate_proj.weight.data_ptr()
    llama_layer.unpack_projections(moved_layers, [other], weights)
    assert not weights
    for name, parameter in moved.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_fused_layers_give_what_the_parts_give(layers):
    layer, spec = layers[0], llama_spec(layers[0])
    x, angles = torch.randn(2, 9, WIDTH), torch.rand(1, 9, HEAD)
    cos, sin = angles.cos(), angles.sin()
    [weights] = llama_layer.pack_projections(layers[:1], [spec])
    shape = llama_layer.layer_shape(layer, spec)
    output, queries, keys, values = llama_layer.prefill(x, cos, sin, weights, shape)
    rows = attention_rows(layer, spec, x, torch.arange(9).expand(2, -1), (cos, sin), None, None)
    probs = llama_layer.attention_probs(queries, keys, torch.arange(9).expand(2, -1), shape)
    torch.testing.assert_close(probs, rows, rtol=0, atol=1e-5)
    attended = (rows @ values.repeat_interleave(HEADS // KEY_HEADS, 1)).transpose(1, 2).flatten(2)
    hidden = x + layer.self_attn.o_proj(attended)
    normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    expected = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_the_group_of_a_split_layer_is_found(layers):
    group = SimpleNamespace(group_name="7")
    layers[0].mlp.down_proj.mp_group = group
    assert tp_group_of(layers) is group
