"""modules.py against torch.nn.MultiheadAttention and against its own contract; attend.py beneath them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gumbel_attention import GumbelAttentionConfig
from gumbel_attention.modules import GumbelMultiheadAttention, GumbelSetAttention
from mha import HARD, HARD_GUMBEL, PLAIN, E, H, L, N, S, inputs, twins


def masks(padding, attn, batched=True):
    """Masks of the kinds named (None, bool, float; attn also 3-D), each leaving the first key of every row."""
    key_padding_mask = attn_mask = None
    if padding:
        hidden = torch.rand(N, S) < 0.4
        hidden[:, 0] = False
        key_padding_mask = hidden if padding == "bool" else torch.randn(N, S).masked_fill(hidden, -torch.inf)
        if not batched:
            key_padding_mask = key_padding_mask[0]
    if attn:
        shape = (L, S) if "3d" not in attn else ((N if batched else 1) * H, L, S)
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        attn_mask = hidden if "bool" in attn else torch.randn(shape).masked_fill(hidden, -torch.inf)
    return key_padding_mask, attn_mask


def run(module, q, k, v, **kw):
    """Output, weights, and the gradients of all parameters and inputs."""
    args = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    module.zero_grad()
    output, weights = module(*args, **kw)
    total = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    if weights is not None:
        total = total + (weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum()
    total.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return output, weights, grads | {f"input {i}": x.grad for i, x in enumerate(args)}


def assert_twins(theirs, ours, q, k, v, **kw):
    want, got = run(theirs, q, k, v, **kw), run(ours, q, k, v, **kw)
    torch.testing.assert_close(got[0], want[0], atol=2e-6, rtol=1e-5)
    assert (got[1] is None) == (want[1] is None)
    if want[1] is not None:
        torch.testing.assert_close(got[1], want[1], atol=2e-6, rtol=1e-5)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        torch.testing.assert_close(got[2][name], grad, atol=5e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class TestAgainstTorch:
    @pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
    @pytest.mark.parametrize(
        ("padding", "attn"),
        [
            *((padding, None) for padding in (None, "bool", "float")),
            *((padding, attn) for padding in (None, "bool") for attn in ("bool", "3d bool")),
            *((padding, attn) for padding in (None, "float") for attn in ("float", "3d float")),
        ],
    )
    def test_masks(self, layout, padding, attn):
        batched = layout != "unbatched"
        theirs, ours = twins(batch_first=layout == "batch_first")
        key_padding_mask, attn_mask = masks(padding, attn, batched)
        q, k, v = inputs(layout == "batch_first", batched=batched)
        assert_twins(theirs, ours, q, k, v, key_padding_mask=key_padding_mask, attn_mask=attn_mask)

    @pytest.mark.parametrize("padding", ["bool", "float"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "kw",
        [
            {},
            {"add_bias_kv": True},
            {"add_zero_attn": True},
            {"add_bias_kv": True, "add_zero_attn": True},
            {"kdim": 7, "vdim": 9},
            {"kdim": 7, "vdim": 9, "add_bias_kv": True},
        ],
        ids=str,
    )
    def test_constructor_arguments(self, kw, bias, padding):
        theirs, ours = twins(bias=bias, batch_first=True, **kw)
        key_padding_mask, attn_mask = masks(padding, f"3d {padding}")
        q, k, v = inputs(True, kw.get("kdim", E), kw.get("vdim", E))
        assert_twins(theirs, ours, q, k, v)
        assert_twins(theirs, ours, q, k, v, key_padding_mask=key_padding_mask, attn_mask=attn_mask)

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("average_attn_weights", [True, False])
    def test_what_is_returned(self, batched, need_weights, average_attn_weights):
        kw = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        assert_twins(*twins(), *inputs(batched=batched), **kw)

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("padding", [None, "float"])
    def test_is_causal_is_a_hint(self, need_weights, padding):
        theirs, ours = twins(batch_first=True)
        q, _, _ = inputs(True)
        causal = nn.Transformer.generate_square_subsequent_mask(L)
        kw = {"key_padding_mask": None if padding is None else masks(padding, None)[0][:, :L]}
        kw |= {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        assert_twins(theirs, ours, q, q, q, **kw)

    def test_is_causal_needs_a_mask(self):
        _, ours = twins()
        with pytest.raises(ValueError, match="needs one"):
            ours(*inputs(), is_causal=True)

    def test_a_wrong_hint_does_not_replace_the_mask(self):
        _, ours = twins()
        q, k, v = inputs()
        full = torch.zeros(L, S, dtype=torch.bool)
        hinted = ours(q, k, v, attn_mask=full, is_causal=True, need_weights=False)[0]
        assert torch.equal(hinted, ours(q, k, v, need_weights=False)[0])

    @pytest.mark.parametrize(("padding", "attn"), [("bool", "float"), ("float", "3d bool")])
    def test_mixed_masks(self, padding, attn):
        theirs, ours = twins()
        key_padding_mask, attn_mask = masks(padding, attn)
        q, k, v = inputs()
        got = ours(q, k, v, key_padding_mask=key_padding_mask, attn_mask=attn_mask)

        def additive(mask):
            return torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask

        want = theirs(q, k, v, key_padding_mask=additive(key_padding_mask), attn_mask=additive(attn_mask))
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)

    def test_masks_of_finfo_min_are_masks(self):
        _, ours = twins(GumbelAttentionConfig(noise="none", tau=0.25))
        q, k, v = inputs()
        hidden, _ = masks("bool", None)
        for lowest in (-torch.inf, torch.finfo(torch.float32).min):
            mask = torch.zeros(N, S).masked_fill(hidden, lowest)
            out = ours(q, k, v, key_padding_mask=mask, attn_mask=mask[0].expand(L, S))
            want = ours(q, k, v, key_padding_mask=hidden, attn_mask=hidden[0].expand(L, S))
            assert torch.equal(out[0], want[0])

    def test_float64(self):
        theirs, ours = twins()
        q, k, v = inputs(dtype=torch.float64)
        torch.testing.assert_close(ours.double()(q, k, v), theirs.double()(q, k, v), atol=1e-13, rtol=1e-12)

    def test_a_learned_mask_gets_torchs_gradient(self):
        theirs, ours = twins()
        q, k, v = inputs()
        grads = []
        for module in (theirs, ours):
            bias = torch.linspace(-1, 1, L * S).view(L, S).requires_grad_()
            module(q, k, v, attn_mask=bias)[0].square().sum().backward()
            grads.append(bias.grad)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("kw", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 7, "vdim": 9}], ids=str)
    def test_same_parameters_from_the_same_seed(self, kw):
        torch.manual_seed(7)
        theirs = nn.MultiheadAttention(E, H, **kw)
        torch.manual_seed(7)
        ours = GumbelMultiheadAttention(E, H, **kw)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for name, x in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], x)
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())


class TestState:
    def test_learned_tau_is_one_more_key(self):
        ours = GumbelMultiheadAttention(E, H, config=GumbelAttentionConfig(learn_tau="head"))
        missing = ours.load_state_dict(nn.MultiheadAttention(E, H).state_dict(), strict=False)
        assert missing.missing_keys == ["gumbel.log_tau"]

    @pytest.mark.parametrize("learn_tau", ["scalar", "head"])
    @pytest.mark.parametrize("hard", [False, True])
    def test_learned_tau_gets_a_gradient(self, learn_tau, hard):
        config = GumbelAttentionConfig(learn_tau=learn_tau, hard=hard)
        ours = GumbelMultiheadAttention(E, H, config=config)
        ours(*inputs())[0].square().sum().backward()
        grad = ours.gumbel.log_tau.grad
        assert grad.shape == ((H,) if learn_tau == "head" else (1,))
        assert (grad != 0).all()
        assert grad.isfinite().all()

    def test_set_tau(self):
        _, ours = twins()
        q, k, v = inputs()
        soft = ours(q, k, v)[1]
        ours.set_tau(0.01)
        assert ours(q, k, v)[1].amax(-1).mean() > soft.amax(-1).mean()
        with pytest.raises(ValueError, match="tau"):
            ours.set_tau(0.0)

    def test_noise_switch(self):
        ours = GumbelMultiheadAttention(E, H).eval()
        q, k, v = inputs()
        off = ours(q, k, v)[0]
        ours.noise(True)
        assert not torch.equal(ours(q, k, v)[0], off)
        ours.noise(None)
        assert torch.equal(ours(q, k, v)[0], off)
        ours.train().noise(False)
        assert torch.equal(ours(q, k, v)[0], off)
        with pytest.raises(ValueError, match="noise"):
            ours.noise("gumble")

    @pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
    @pytest.mark.parametrize("kind", [GumbelMultiheadAttention, GumbelSetAttention])
    def test_copies(self, clone, kind):
        ours = kind(E, H, config=HARD_GUMBEL).eval()
        ours.set_tau(0.3)
        if clone == "deepcopy":
            other = copy.deepcopy(ours)
        elif clone == "pickle":
            other = pickle.loads(pickle.dumps(ours))
        else:
            buffer = io.BytesIO()
            torch.save(ours, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        x = torch.randn(L, N, E)
        args = (x, x, x) if kind is GumbelMultiheadAttention else (x,)
        assert other.gumbel.config == HARD_GUMBEL
        assert torch.equal(other(*args)[0], ours(*args)[0])
        other.set_tau(2.0)
        assert ours.gumbel.tau == torch.tensor(0.3)

    @pytest.mark.parametrize("kind", [GumbelMultiheadAttention, GumbelSetAttention])
    def test_bfloat16_keeps_tau_in_float32(self, kind):
        ours = kind(E, H, config=GumbelAttentionConfig(tau=0.3, learn_tau="head")).bfloat16()
        assert ours.out_proj.weight.dtype == torch.bfloat16
        assert ours.gumbel.log_tau.dtype == torch.float32
        x = torch.randn(L, N, E, dtype=torch.bfloat16)
        assert ours(*(x, x, x) if kind is GumbelMultiheadAttention else (x,))[0].dtype == torch.bfloat16

    @pytest.mark.parametrize("kw", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
    def test_autocast(self, kw):
        theirs, ours = twins(**kw)
        q, k, v = inputs()
        want = ours(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            out, weights = ours(q, k, v)
            assert out.dtype == theirs(q, k, v)[0].dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), want[0], atol=0.05, rtol=0.05)
        torch.testing.assert_close(weights.float(), want[1], atol=0.02, rtol=0.05)
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


class TestChoice:
    def test_modes(self):
        ours = GumbelMultiheadAttention(E, H)
        q, k, v = inputs()
        torch.manual_seed(1)
        first, second = ours(q, k, v)[0], ours(q, k, v)[0]
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(ours(q, k, v)[0], first)
        ours.eval()
        state = torch.get_rng_state()
        assert torch.equal(ours(q, k, v)[0], ours(q, k, v)[0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_eval_is_torchs_softmax_for_a_soft_choice(self):
        theirs, ours = twins(GumbelAttentionConfig())
        q, k, v = inputs()
        torch.testing.assert_close(ours.eval()(q, k, v), theirs.eval()(q, k, v), atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("config", [HARD, HARD_GUMBEL])
    def test_hard_weights_are_one_hot(self, config):
        ours = GumbelMultiheadAttention(E, H, config=config)
        key_padding_mask, attn_mask = masks("bool", "bool")
        q, k, v = inputs()
        _, weights = ours(q, k, v, key_padding_mask=key_padding_mask, attn_mask=attn_mask, average_attn_weights=False)
        assert ((weights == 0) | (weights == 1)).all()
        assert (weights.sum(-1) == 1).all()
        assert not (weights.detach() * (key_padding_mask[:, None, None] | attn_mask)).any()

    def test_dropout_shows_in_the_weights(self):
        ours = GumbelMultiheadAttention(E, H, dropout=0.5, config=HARD)
        q, k, v = inputs()
        weights = ours(q, k, v, average_attn_weights=False)[1]
        assert set(weights.sum(-1).unique().tolist()) == {0.0, 2.0}
        assert (ours.eval()(q, k, v, average_attn_weights=False)[1].sum(-1) == 1).all()

    def test_fully_masked_rows_are_zero_before_out_proj(self):
        _, ours = twins(GumbelAttentionConfig(noise="none", tau=0.3))
        q, k, v = inputs()
        hidden = torch.zeros(N, S, dtype=torch.bool)
        hidden[1] = True
        out, _, grads = run(ours, q, k, v, key_padding_mask=hidden)
        assert torch.equal(out[:, 1], ours.out_proj.bias.expand(L, E))
        assert all(grad.isfinite().all() for grad in grads.values())

    @pytest.mark.parametrize("config", [PLAIN, GumbelAttentionConfig(), HARD_GUMBEL])
    @pytest.mark.parametrize("lowest", [None, -torch.inf, torch.finfo(torch.float32).min])
    @pytest.mark.parametrize("junk", [torch.nan, torch.inf])
    def test_padding_is_never_read(self, config, lowest, junk):
        _, ours = twins(config)
        q, k, v = inputs()
        hidden, _ = masks("bool", None)
        mask = hidden if lowest is None else torch.zeros(N, S).masked_fill(hidden, lowest)
        results = []
        for filler in (0.0, junk):
            torch.manual_seed(3)
            fill = hidden.T[..., None]
            results.append(
                run(ours, q, k.masked_fill(fill, filler), v.masked_fill(fill, filler), key_padding_mask=mask)
            )
        assert torch.equal(results[0][0], results[1][0])
        for name, grad in results[0][2].items():
            assert torch.equal(results[1][2][name], grad), name
