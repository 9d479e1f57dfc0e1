"""A selection of heads: the others keep their plain softmax, to the bit."""

import pytest
import torch

from gumbel_attention import GumbelAttentionConfig, gumbel_attention_with_info
from gumbel_attention.attend import attend
from gumbel_attention.modules import GumbelMultiheadAttention
from gumbel_attention.state import AttentionState
from mha import E, H, L, N, S, inputs, twins


class TestHeads:
    @pytest.mark.parametrize("heads", [(1,), (0, -1), (0, 1, 2, 3)])
    @pytest.mark.parametrize("hard", [False, True])
    def test_the_others_keep_their_softmax(self, heads, hard):
        _, plain = twins()
        ours = GumbelMultiheadAttention(E, H, config=GumbelAttentionConfig(hard=hard, tau=0.5, heads=heads))
        ours.load_state_dict(plain.state_dict())
        q, k, v = inputs()
        weights = ours(q, k, v, average_attn_weights=False)[1]
        softmax = plain(q, k, v, average_attn_weights=False)[1]
        chosen = {head % H for head in heads}
        for head in range(H):
            assert torch.equal(weights[:, head], softmax[:, head]) == (head not in chosen)
            if head in chosen and hard:
                assert (weights[:, head].amax(-1) == 1).all()

    def test_info_of_left_out_heads(self):
        state = AttentionState(GumbelAttentionConfig(hard=True, heads=(0,)), H)
        q, k, v = torch.randn(N, H, L, 3), torch.randn(N, 2, S, 3), torch.randn(N, 2, S, 5)
        info = attend(state, True, q, k, v)
        assert info.output.shape == (N, H, L, 5)
        assert (info.indices[:, 0] >= 0).all()
        assert (info.indices[:, 1:] == -1).all()
        assert (info.log_prob[:, 0] < 0).all()
        assert (info.log_prob[:, 1:] == 0).all()
        want = gumbel_attention_with_info(q, k, v, noise="none", enable_gqa=True)
        assert torch.equal(info.output[:, 1:], want.output[:, 1:])

    def test_attend_passes_everything_on(self):
        state = AttentionState(GumbelAttentionConfig(noise_scale=0.5, tau=0.7), H)
        q, k, v = torch.randn(N, H, L, 3), torch.randn(N, 2, L, 3), torch.randn(N, 2, L, 3)
        mask, sinks = torch.randn(L, L), torch.randn(H)
        torch.manual_seed(5)
        got = attend(state, True, q, k, v, mask, 0.2, True, 0.4, softcap=3.0, sinks=sinks)
        torch.manual_seed(5)
        want = gumbel_attention_with_info(
            q, k, v, mask, 0.2, True, 0.4, True, tau=0.7, noise_scale=0.5, softcap=3.0, sinks=sinks
        )
        torch.testing.assert_close(got.output, want.output, atol=0, rtol=1e-6)

    def test_a_query_with_other_heads_is_refused(self):
        state = AttentionState(GumbelAttentionConfig(heads=(0,)), H)
        x = torch.randn(N, 2, L, 3)
        with pytest.raises(ValueError, match="selects from 4 heads"):
            attend(state, True, x, x, x)

    def test_left_out_heads_give_a_learned_tau_no_gradient(self):
        config = GumbelAttentionConfig(learn_tau="head", heads=(0, 2))
        ours = GumbelMultiheadAttention(E, H, config=config)
        ours(*inputs())[0].square().sum().backward()
        assert ((ours.gumbel.log_tau.grad != 0) == torch.tensor([True, False, True, False])).all()
