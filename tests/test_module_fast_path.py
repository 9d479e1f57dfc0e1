"""GumbelMultiheadAttention inside torch's TransformerEncoder: its fused softmax kernels never bypass it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gumbel_attention.modules import GumbelMultiheadAttention
from mha import HARD, PLAIN, E, H, L, N, S, nested_is_a_prototype


def encoder_layer(config, **kw):
    """A torch layer all of whose conditions for the fused kernel hold, with our attention in it."""
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, **kw)
    ours = GumbelMultiheadAttention(E, H, batch_first=True, config=config)
    ours.load_state_dict(layer.self_attn.state_dict())
    other = copy.deepcopy(layer)
    other.self_attn = ours
    return layer.eval(), other.eval()


def by_hand(layer, x, padding=None):
    """The forward of a post-norm TransformerEncoderLayer in eval mode."""
    x = layer.norm1(x + layer.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)[0])
    return layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))


class TestFastPath:
    @pytest.mark.parametrize("clone", [False, True])
    @pytest.mark.parametrize("padded", [False, True])
    def test_encoder_layer_does_not_bypass_it(self, clone, padded):
        softmax, ours = encoder_layer(HARD)
        if clone:
            ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        x = torch.randn(N, L, E)
        padding = torch.arange(L) >= torch.tensor([[L], [3], [2]]) if padded else None
        with torch.no_grad():
            out = ours(x, src_key_padding_mask=padding)
            torch.testing.assert_close(out, by_hand(ours, x, padding), atol=1e-6, rtol=1e-5)
            assert (out - softmax(x, src_key_padding_mask=padding)).abs().amax() > 0.1

    def test_a_plain_choice_is_the_torch_layer(self):
        softmax, ours = encoder_layer(PLAIN)
        x = torch.randn(N, L, E)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), softmax(x), atol=2e-6, rtol=1e-5)

    def test_without_its_hook_it_refuses(self):
        _, ours = encoder_layer(HARD)
        ours.self_attn._forward_pre_hooks.clear()
        with torch.no_grad(), pytest.raises(RuntimeError, match="would bypass"):
            ours(torch.randn(N, L, E))

    def test_alone_in_eval(self):
        """nn.MultiheadAttention has a fused kernel of its own for self-attention in eval mode."""
        ours = GumbelMultiheadAttention(E, H, batch_first=True, config=HARD).eval()
        x = torch.randn(N, L, E)
        with torch.no_grad():
            weights = ours(x, x, x, average_attn_weights=False)[1]
        assert (weights.amax(-1) == 1).all()

    @nested_is_a_prototype
    @pytest.mark.parametrize("config", [PLAIN, HARD])
    @pytest.mark.parametrize("swap", ["before", "after"])
    def test_encoder_with_nested_tensors(self, config, swap):
        softmax, ours = encoder_layer(config)
        encoder = nn.TransformerEncoder(ours if swap == "before" else softmax, 2).eval()
        if swap == "after":
            for layer in encoder.layers:
                layer.self_attn = copy.deepcopy(ours.self_attn)
        reference = nn.TransformerEncoder(softmax, 2).eval()
        padding = torch.arange(L) >= torch.tensor([[L], [3], [2]])
        x = torch.randn(N, L, E).masked_fill(padding[..., None], 0.0)
        with torch.no_grad():
            out = encoder(x, src_key_padding_mask=padding)
            want = by_hand(encoder.layers[1], by_hand(encoder.layers[0], x, padding), padding)
            plain = reference(x, src_key_padding_mask=padding)
        assert encoder.use_nested_tensor
        torch.testing.assert_close(out, want.masked_fill(padding[..., None], 0.0), atol=2e-6, rtol=1e-5)
        assert ((out - plain).abs().amax() < 1e-5) == (config is PLAIN)

    @nested_is_a_prototype
    def test_nested_tensors_elsewhere_are_refused(self):
        ours = GumbelMultiheadAttention(E, H, batch_first=True)
        x = torch.nested.as_nested_tensor([torch.randn(2, E), torch.randn(3, E)])
        with pytest.raises(ValueError, match="nested"):
            ours(x, x, x)

    def test_decoder_layer(self):
        layer = nn.TransformerDecoderLayer(E, H, 16, batch_first=True).eval()
        before = layer(x := torch.randn(N, L, E), memory := torch.randn(N, S, E))
        for name in ("self_attn", "multihead_attn"):
            theirs = getattr(layer, name)
            setattr(layer, name, GumbelMultiheadAttention(E, H, batch_first=True, config=PLAIN).eval())
            getattr(layer, name).load_state_dict(theirs.state_dict())
        torch.testing.assert_close(layer(x, memory), before, atol=2e-6, rtol=1e-5)
