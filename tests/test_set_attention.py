"""GumbelSetAttention: choices, masks, permutations, gradients."""

import pytest
import torch
from torch import nn

from gumbel_attention import GumbelAttentionConfig
from gumbel_attention.modules import GumbelSetAttention
from mha import HARD, HARD_GUMBEL, PLAIN, E, H, N, S


class TestSetAttention:
    Q = 2

    def make(self, config=HARD, **kw):
        return GumbelSetAttention(E, H, self.Q, config=config, **kw)

    @pytest.mark.parametrize("config", [PLAIN, HARD, HARD_GUMBEL, GumbelAttentionConfig()])
    def test_shapes(self, config):
        out = self.make(config)(torch.randn(N, S, E))
        assert out.output.shape == (N, self.Q, E)
        assert out.weights.shape == (N, H, self.Q, S)
        assert (out.indices is not None) == config.hard
        assert (out.log_prob is not None) == (config == HARD_GUMBEL)
        if config.hard:
            assert out.indices.shape == (N, H, self.Q)
            assert out.indices.dtype == torch.int64
            assert torch.equal(out.weights.argmax(-1), out.indices)

    @pytest.mark.parametrize("config", [PLAIN, HARD])
    def test_a_permutation_only_permutes(self, config):
        ours, x, order = self.make(config), torch.randn(N, S, E), torch.randperm(S)
        mask = torch.rand(N, S) < 0.7
        before, after = ours(x, mask=mask), ours(x[:, order], mask=mask[:, order])
        torch.testing.assert_close(after.output, before.output, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(after.weights, before.weights[..., order], atol=1e-6, rtol=1e-5)
        if config.hard:
            took = before.indices >= 0
            assert torch.equal(order[after.indices[took]], before.indices[took])

    def test_it_is_multihead_attention(self):
        ours, x, values = self.make(PLAIN, kdim=7, vdim=9), torch.randn(N, S, 7), torch.randn(N, S, 9)
        theirs = nn.MultiheadAttention(E, H, kdim=7, vdim=9, batch_first=True)
        with torch.no_grad():
            for name in "qkv":
                getattr(theirs, f"{name}_proj_weight").copy_(getattr(ours, f"{name}_proj").weight)
            theirs.out_proj.weight.copy_(ours.out_proj.weight)
        mask = torch.ones(N, S, dtype=torch.bool)
        mask[1, 2:] = False
        queries = ours.queries.expand(N, -1, -1)
        want = theirs(queries, x, values, key_padding_mask=~mask, average_attn_weights=False)
        got = ours(x, mask=mask, values=values)
        torch.testing.assert_close((got.output, got.weights), want, atol=2e-6, rtol=1e-5)

    def test_values_default_to_the_elements(self):
        ours, x = self.make(kdim=7), torch.randn(N, S, 7)
        assert torch.equal(ours(x).output, ours(x, values=x).output)

    def test_a_query_of_ones_own(self):
        ours, x = self.make(), torch.randn(N, S, E)
        want = ours(x)
        assert torch.equal(ours(x, query=ours.queries.expand(N, -1, -1)).output, want.output)
        assert ours(x, query=torch.randn(N, 5, E)).output.shape == (N, 5, E)

    @pytest.mark.parametrize("config", [PLAIN, HARD, HARD_GUMBEL])
    def test_masked_elements_are_never_read(self, config):
        ours, x = self.make(config), torch.randn(N, S, E)
        mask = torch.rand(N, S) < 0.5
        mask[:, 0] = True
        results = []
        for junk in (0.0, torch.nan, torch.inf):
            torch.manual_seed(2)
            ours.zero_grad()
            out = ours(x.masked_fill(~mask[..., None], junk), mask=mask)
            out.output.square().sum().backward()
            results.append((out.output, [p.grad.clone() for p in ours.parameters()]))
        for output, grads in results[1:]:
            assert torch.equal(output, results[0][0])
            assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))
        if config.hard:
            chosen = out.indices
            assert mask[torch.arange(N)[:, None, None], chosen].all()

    @pytest.mark.parametrize("config", [PLAIN, HARD_GUMBEL])
    def test_an_empty_set(self, config):
        ours, x = self.make(config), torch.randn(N, S, E, requires_grad=True)
        with torch.no_grad():
            ours.out_proj.bias.normal_()
        mask = torch.ones(N, S, dtype=torch.bool)
        mask[1] = False
        out = ours(x, mask=mask)
        assert torch.equal(out.output[1], ours.out_proj.bias.expand(self.Q, E))
        assert (out.weights[1] == 0).all()
        if config.hard:
            assert (out.indices[1] == -1).all()
            assert (out.indices[0] >= 0).all()
            assert (out.log_prob[1] == 0).all()
        out.output.sum().backward()
        assert all(p.grad.isfinite().all() for p in [*ours.parameters(), x])
        assert (x.grad[1] == 0).all()

    @pytest.mark.parametrize("config", [PLAIN, HARD, HARD_GUMBEL])
    def test_gradients_reach_the_learned_queries(self, config):
        ours = self.make(config)
        ours(torch.randn(N, S, E)).output.square().sum().backward()
        assert all((p.grad != 0).any() for name, p in ours.named_parameters() if name != "k_proj.bias")

    def test_score_function_gradient(self):
        ours = self.make(HARD_GUMBEL)
        ours(torch.randn(N, S, E)).log_prob.sum().backward()
        assert (ours.queries.grad != 0).all()

    def test_it_learns_to_find_the_marked_element(self):
        """The target is the content of the one element whose first feature is set."""
        ours = GumbelSetAttention(8, 1, config=GumbelAttentionConfig(hard=True, tau=1.0))
        optimizer = torch.optim.Adam(ours.parameters(), lr=0.02)

        def batch(n):
            x, marked = torch.randn(n, S, 8), torch.randint(S, (n,))
            x[..., 0] = 0.0
            x[torch.arange(n), marked, 0] = 3.0
            return x, marked

        for _ in range(150):
            x, marked = batch(64)
            target = x[torch.arange(64), marked]
            loss = (ours(x).output[:, 0] - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, marked = batch(256)
        assert (ours.eval()(x).indices[:, 0, 0] == marked).float().mean() > 0.95

    def test_dropout_only_in_training(self):
        ours, x = self.make(dropout=0.5), torch.randn(N, S, E)
        assert set(ours(x).weights.sum(-1).unique().tolist()) == {0.0, 2.0}
        assert (ours.eval()(x).weights.sum(-1) == 1).all()

    def test_repr_says_what_it_is(self):
        text = repr(self.make())
        assert "num_queries=2" in text
        assert "hard=True" in text
