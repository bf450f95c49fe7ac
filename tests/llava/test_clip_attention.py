"""The attention of CLIP's vision towers, beside that of transformers."""

import pytest
import torch
from test_fast import EXAMPLES
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionTransformer

import strategy
from llava.model.builder import load_pretrained_model
from llava.model.clip_attention import clip_forward

DEVICES = [pytest.param("cpu", torch.float32)]
if torch.cuda.is_available():
    DEVICES += [pytest.param("cuda", torch.float32), pytest.param("cuda", torch.float16)]


def small(device, dtype):
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=128, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2)
    return CLIPVisionTransformer(config).to(device, dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 257), (3, 577), (5, 8)])
def test_it_is_that_of_transformers(device, dtype, count, length):
    attention = small(device, dtype).encoder.layers[0].self_attn
    hidden = torch.randn(count, length, 128, device=device, dtype=dtype)
    expected, _ = CLIPAttention.forward(attention.float(), hidden.float())
    seen, weights = clip_forward(attention.to(dtype), hidden)
    assert weights is None
    assert seen.dtype == dtype
    torch.testing.assert_close(seen.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_mask", "causal_attention_mask", "output_attentions"])
def test_transformers_computes_what_masks_or_returns_weights(name):
    attention = small("cpu", torch.float32).encoder.layers[0].self_attn
    hidden, mask = torch.randn(2, 6, 128), torch.zeros(2, 1, 6, 6)
    mask[..., 4:] = -1e4
    given = {name: True if name == "output_attentions" else mask}
    seen, expected = (function(attention, hidden, **given) for function in (clip_forward, CLIPAttention.forward))
    assert torch.equal(seen[0], expected[0])
    assert (seen[1] is None) == (expected[1] is None)


def test_the_graph_engine_puts_it_in_place_and_takes_it_away():
    _, model, _, _ = load_pretrained_model(
        str(EXAMPLES / "checkpoints/shapes-llava"), device="cpu", dtype=torch.float32
    )
    modules = [module for module in model.modules() if type(module) is CLIPAttention]
    assert modules
    for engine, replaced in (("eager", False), ("graph", True)):
        with strategy.prune(model, strategy.VTRConfig(engine=engine, enabled=False)):
            assert all(("forward" in vars(module)) == replaced for module in modules)
        assert not any("forward" in vars(module) for module in modules)
