"""What bad arguments to the modules get."""

import pytest
import torch

from gumbel_attention import GumbelAttentionConfig
from gumbel_attention.modules import GumbelMultiheadAttention, GumbelSetAttention
from mha import E, H, L, N, S, inputs


class TestErrors:
    @pytest.mark.parametrize("kind", [GumbelMultiheadAttention, GumbelSetAttention])
    @pytest.mark.parametrize(
        ("args", "config", "error", "match"),
        [
            ((10, 3), None, ValueError, "multiple of num_heads"),
            ((0, 1), None, ValueError, "multiple of num_heads"),
            ((8, 2), GumbelAttentionConfig(layers=(0,)), ValueError, "layers selects"),
            ((8, 2), GumbelAttentionConfig(heads=(2,)), ValueError, "match nothing"),
            ((8, 2), {"tau": 1.0}, TypeError, "GumbelAttentionConfig"),
        ],
    )
    def test_constructor(self, kind, args, config, error, match):
        with pytest.raises(error, match=match):
            kind(*args, config=config)

    @pytest.mark.parametrize("kw", [{"num_queries": 0}, {"dropout": 1.5}])
    def test_set_constructor(self, kw):
        with pytest.raises(ValueError, match="num_queries must be >= 1 and dropout"):
            GumbelSetAttention(E, H, **kw)

    @pytest.mark.parametrize(
        ("q", "k", "v", "match"),
        [
            ((L, N, E), (S, E), (S, E), "all be 3-D"),
            ((1, L, N, E), (1, S, N, E), (1, S, N, E), "all be 3-D"),
            ((L, N, E + 1), (S, N, E), (S, N, E), "query must be"),
            ((L, N, E), (S, N + 1, E), (S, N, E), "key must be"),
            ((L, N, E), (S, N, E), (S + 1, N, E), "value must be"),
            ((L, N, E), (S, N, E), (S, N, E + 1), "value must be"),
        ],
    )
    def test_shapes(self, q, k, v, match):
        ours = GumbelMultiheadAttention(E, H)
        with pytest.raises(ValueError, match=match):
            ours(torch.randn(q), torch.randn(k), torch.randn(v))

    @pytest.mark.parametrize(
        ("kw", "error", "match"),
        [
            ({"key_padding_mask": torch.zeros(S, N).bool()}, ValueError, "key_padding_mask must have shape"),
            ({"key_padding_mask": torch.zeros(N, S).int()}, TypeError, "key_padding_mask must be bool"),
            ({"attn_mask": torch.zeros(N, L, S)}, ValueError, r"attn_mask must have shape \(5, 6\) or \(12, 5, 6\)"),
            ({"attn_mask": torch.zeros(L, S).long()}, TypeError, "attn_mask must be bool"),
        ],
    )
    def test_masks(self, kw, error, match):
        ours = GumbelMultiheadAttention(E, H)
        with pytest.raises(error, match=match):
            ours(*inputs(), **kw)

    @pytest.mark.parametrize(
        ("kw", "error", "match"),
        [
            ({"elements": torch.zeros(N, E)}, ValueError, "elements must be"),
            ({"values": torch.zeros(N, S + 1, E)}, ValueError, "values must be"),
            ({"query": torch.zeros(1, 2, E)}, ValueError, "query must be"),
            ({"mask": torch.ones(S, N).bool()}, ValueError, "mask must be"),
            ({"mask": torch.ones(N, S)}, TypeError, "True takes part"),
        ],
    )
    def test_set_inputs(self, kw, error, match):
        ours = GumbelSetAttention(E, H)
        with pytest.raises(error, match=match):
            ours(**{"elements": torch.zeros(N, S, E)} | kw)
