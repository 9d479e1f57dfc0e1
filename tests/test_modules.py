"""modules.py against torch.nn.MultiheadAttention and against its own contract; attend.py beneath them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gumbel_attention import GumbelAttentionConfig, gumbel_attention_with_info
from gumbel_attention.attend import attend
from gumbel_attention.modules import GumbelMultiheadAttention, GumbelSetAttention
from gumbel_attention.state import AttentionState

E, H, L, S, N = 12, 4, 5, 6, 3
PLAIN = GumbelAttentionConfig(noise="none")
HARD = GumbelAttentionConfig(noise="none", hard=True)
HARD_GUMBEL = GumbelAttentionConfig(hard=True)
nested_is_a_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def twins(config=PLAIN, **kw):
    """A torch module and ours with the same weights, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, **kw)
    ours = GumbelMultiheadAttention(E, H, **kw, config=config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict(), strict=config.learn_tau is None)
    return theirs, ours


def inputs(batch_first=False, kdim=E, vdim=E, batched=True, dtype=torch.float32):
    """Query, key and value that want gradients, in either layout."""
    shapes = [(L, E), (S, kdim), (S, vdim)]
    if batched:
        shapes = [(N, n, e) if batch_first else (n, N, e) for n, e in shapes]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


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
