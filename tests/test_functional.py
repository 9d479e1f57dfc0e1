"""The functions' meaning: equal to torch's where they must be, and what the choice, masks and dtypes do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gumbel_attention as ga


def qkv(
    *lead: int, lq: int = 6, lk: int = 9, d: int = 4, dv: int = 5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [torch.randn(*lead, n, m, dtype=dtype) for n, m in ((lq, d), (lk, d), (lk, dv))]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_softmax_equals_sdpa(lead: tuple[int, ...], mask: str) -> None:
    q, k, v = qkv(*lead)
    keep = torch.rand(6, 9) > 0.3
    keep[:, 0] = True
    attn_mask = {"bool": keep, "float": torch.randn(6, 9, dtype=torch.float64)}.get(mask)
    got = ga.gumbel_attention(q, k, v, attn_mask, is_causal=mask == "causal", noise="none", scale=0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=mask == "causal", scale=0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lq", "lk"), [(4, 7), (7, 4), (1, 5)])
def test_causal_with_unequal_lengths_is_sdpas(lq: int, lk: int) -> None:
    q, k, v = qkv(2, 2, lq=lq, lk=lk)
    got = ga.gumbel_attention(q, k, v, is_causal=True, noise="none")
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_causal_offset_is_a_cache() -> None:
    q, k, v = qkv(2, 2, lq=9)
    whole = ga.gumbel_attention(q, k, v, is_causal=True, seed=4)
    last = ga.gumbel_attention(q[..., 6:, :], k, v, is_causal=True, seed=4, q_offset=6)
    torch.testing.assert_close(last, whole[..., 6:, :])
    each = ga.gumbel_attention(q[..., 6:, :], k, v, is_causal=True, seed=4, q_offset=torch.tensor([6, 6]))
    torch.testing.assert_close(each, last)


def test_grouped_queries_draw_noise_for_each_query_head() -> None:
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    info = ga.gumbel_attention_with_info(q, k, v, enable_gqa=True, seed=1)
    full = ga.gumbel_attention_with_info(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), seed=1)
    torch.testing.assert_close(info, full)
    plain = ga.gumbel_attention(q, k, v, enable_gqa=True, noise="none")
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    same = ga.gumbel_attention_with_info(q[:, :1].expand_as(q), k, v, enable_gqa=True, seed=1).weights
    assert not torch.equal(same[:, 0], same[:, 1])


def test_soft_is_the_formula() -> None:
    q, k, v = qkv(2, 3)
    where = ga.noise.Coordinates(torch.tensor(8), 2, 3, 6, 9)
    g = ga.noise.sample("gumbel", where)
    z = (q @ k.mT * 0.5 + 0.7 * g) / 0.4
    got = ga.gumbel_attention(q, k, v, scale=0.5, tau=0.4, noise_scale=0.7, seed=8)
    torch.testing.assert_close(got, z.softmax(-1) @ v)
    hard = ga.gumbel_attention_with_info(q, k, v, scale=0.5, tau=0.4, noise_scale=0.7, seed=8, hard=True)
    assert hard.indices is not None
    assert torch.equal(hard.indices, z.argmax(-1))
    assert torch.equal(hard.weights, F.one_hot(z.argmax(-1), 9).double())
    assert torch.equal(hard.output, torch.take_along_dim(v, z.argmax(-1)[..., None], -2))


def test_log_prob_is_that_of_the_distribution_sampled_whatever_tau() -> None:
    q, k, v = qkv(2, 3)
    want = (q @ k.mT / 2 / 0.7).log_softmax(-1)
    for tau in (0.1, 1.0, 5.0):
        info = ga.gumbel_attention_with_info(q, k, v, tau=tau, noise_scale=0.7, hard=True, seed=2)
        assert info.log_prob is not None
        assert info.indices is not None
        torch.testing.assert_close(info.log_prob, want.gather(-1, info.indices[..., None])[..., 0])
    assert ga.gumbel_attention_with_info(q, k, v, noise="normal", hard=True).log_prob is None
    assert ga.gumbel_attention_with_info(q, k, v).log_prob is None


def test_three_dimensions_are_heads() -> None:
    q, k, v = torch.randn(4, 5, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 3)
    tau = torch.tensor([0.5, 1.0, 1.5, 2.0])
    got = ga.gumbel_attention(q, k, v, enable_gqa=True, tau=tau, seed=1)
    assert torch.equal(got, ga.gumbel_attention(q[None], k[None], v[None], enable_gqa=True, tau=tau, seed=1)[0])


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("lead", [(0, 2), (0, 3, 2)])
def test_empty_batches_give_empty_results(lead: tuple[int, ...], impl: str) -> None:
    q, k, v = qkv(*lead)
    assert ga.gumbel_attention(q, k, v, hard=True, impl=impl).shape == (*lead, 6, 5)
    assert ga.gumbel_attention(q[..., :0, :], k, v, impl=impl).shape == (*lead, 0, 5)
    assert ga.gumbel_softmax(q).shape == q.shape


def test_softcap_and_sinks() -> None:
    q, k, v = qkv(2, 3)
    sinks = torch.randn(3, dtype=torch.float64)
    scores = 2.0 * torch.tanh(q @ k.mT / 2 / 2.0)
    weights = torch.cat([scores, sinks[None, :, None, None].expand(2, 3, 6, 1)], -1).softmax(-1)[..., :-1]
    got = ga.gumbel_attention(q, k, v, noise="none", softcap=2.0, sinks=sinks)
    torch.testing.assert_close(got, weights @ v)
    drowned = ga.gumbel_attention_with_info(q, k, v, hard=True, sinks=torch.full((3,), 1e3))
    assert drowned.indices is not None
    assert (drowned.indices == -1).all()
    assert (drowned.output == 0).all()
    noisy = ga.gumbel_attention_with_info(q, k, v, seed=3, hard=True, sinks=torch.full((3,), -1e3))
    plain = ga.gumbel_attention_with_info(q, k, v, seed=3, hard=True)
    assert torch.equal(noisy.output, plain.output)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [0.01, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min"])
def test_rows_without_keys_give_zero_and_no_gradient(hard: bool, tau: float, kind: str) -> None:
    q, k, v = (x.float().requires_grad_() for x in qkv(2, 2))
    keep = torch.rand(2, 1, 6, 9) > 0.4
    keep[0, :, 2] = keep[1, :, :4] = False
    low = {"-inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min}.get(kind, 0.0)
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, low)
    info = ga.gumbel_attention_with_info(q, k, v, mask, tau=tau, hard=hard, seed=1)
    empty = ~keep.any(-1).expand(2, 2, 6)
    assert (info.output[empty] == 0).all()
    assert (info.weights[empty] == 0).all()
    assert (info.weights.masked_select(~keep) == 0).all()
    if hard:
        assert info.indices is not None
        assert info.log_prob is not None
        assert (info.indices[empty] == -1).all()
        assert (info.log_prob[empty] == 0).all()
    grads = torch.autograd.grad(info.output.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][empty] == 0).all()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_stands_in_padding_never_reaches_an_output(hard: bool, bad: float) -> None:
    q, k, v = qkv(2, 2)
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[0, ..., 5:] = keep[1, ..., :3] = False
    clean = ga.gumbel_attention(q, k, v, keep, hard=hard, seed=5)
    k2, v2 = (x.masked_fill(~keep.mT, bad).requires_grad_() for x in (k, v))
    got = ga.gumbel_attention(q.requires_grad_(), k2, v2, keep, hard=hard, seed=5)
    assert torch.equal(got, clean)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), (q, k2, v2)))


def test_hard_reads_only_the_chosen_value() -> None:
    q, k, v = qkv(1, 1, lk=2)
    v[..., 1, :] = math.nan
    first = torch.tensor([0.0, -100.0], dtype=torch.float64)
    assert ga.gumbel_attention(q, k, v, first, hard=True).isfinite().all()


def test_minus_ten_thousand_is_a_bias_not_a_mask() -> None:
    q, k, v = qkv(1, 1)
    biased = ga.gumbel_attention(q, k, v, torch.full((6, 9), -1e4, dtype=torch.float64), noise="none")
    torch.testing.assert_close(biased, ga.gumbel_attention(q, k, v, noise="none"))


@pytest.mark.parametrize("hard", [False, True])
def test_dropout_acts_on_the_weights_used(hard: bool) -> None:
    q, k, v = qkv(4, 8, lq=32, lk=32)
    info = ga.gumbel_attention_with_info(q, k, v, dropout_p=0.25, hard=hard, seed=3)
    kept = ga.gumbel_attention_with_info(q, k, v, hard=hard, seed=3).weights
    dropped = (info.weights == 0) & (kept != 0)
    torch.testing.assert_close(info.weights, torch.where(dropped, 0.0, kept / 0.75))
    torch.testing.assert_close(info.output, info.weights @ v)
    n, share = int((kept != 0).sum()), dropped.sum() / (kept != 0).sum()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    assert (ga.gumbel_attention(q, k, v, dropout_p=1.0, hard=hard) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
def test_half_precision_is_float32_inside(dtype: torch.dtype, hard: bool) -> None:
    q, k, v = (x.to(dtype) for x in qkv(2, 3))
    got = ga.gumbel_attention_with_info(q, k, v, hard=hard, seed=1)
    want = ga.gumbel_attention_with_info(q.float(), k.float(), v.float(), hard=hard, seed=1)
    assert got.output.dtype == got.weights.dtype == dtype
    assert torch.equal(got.output, want.output.to(dtype))


def test_autocast_casts_as_sdpa_does() -> None:
    q, k, v = qkv(2, 3, dtype=torch.float32)
    v = v.bfloat16()  # as after rotary embeddings, which leave query and key in float32
    with torch.autocast("cpu", torch.bfloat16):
        got = ga.gumbel_attention(q, k, v, noise="none")
        want = F.scaled_dot_product_attention(q, k, v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_is_attentions_weights(hard: bool) -> None:
    logits = torch.randn(2, 3, 6, 9)
    eye = torch.eye(9).expand(2, 3, 9, 9)
    for dim in (-1, 0, 2):
        moved = logits.movedim(dim, -1)
        got = ga.gumbel_softmax(logits, 0.5, hard, dim=dim, seed=3).movedim(dim, -1)
        where = ga.noise.Coordinates(torch.tensor(3), 1, moved.shape[0] * moved.shape[1], *moved.shape[2:])
        z = (moved + ga.noise.sample("gumbel", where).float().reshape(moved.shape)) / 0.5
        want = F.one_hot(z.argmax(-1), z.shape[-1]).float() if hard else z.softmax(-1)
        torch.testing.assert_close(got, want)
    attention = ga.gumbel_attention(logits, eye, eye, scale=1.0, tau=0.5, hard=hard, seed=3)
    torch.testing.assert_close(
        attention.reshape(6, 6, 9), ga.gumbel_softmax(logits, 0.5, hard, seed=3).reshape(6, 6, 9)
    )


def test_gumbel_softmax_takes_torchs_positions() -> None:
    logits = torch.randn(5, 7)
    torch.manual_seed(1)
    positional = ga.gumbel_softmax(logits, 0.5, True, 1e-10, 0)
    torch.manual_seed(1)
    assert torch.equal(positional, ga.gumbel_softmax(logits, tau=0.5, hard=True, dim=0))
    assert torch.equal(positional.sum(0), torch.ones(7))
    assert ga.gumbel_softmax(torch.randn(4)).shape == (4,)


@pytest.mark.parametrize("kind", ["logits", "bool", "float"])
@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_masks_exactly(kind: str, hard: bool) -> None:
    logits = torch.randn(50, 8).bfloat16().requires_grad_()
    keep = torch.rand(50, 8) > 0.5
    keep[3] = False
    if kind == "logits":
        y = ga.gumbel_softmax(logits.masked_fill(~keep, -math.inf), 0.3, hard)
    else:
        mask = keep if kind == "bool" else torch.zeros(50, 8).masked_fill(~keep, -math.inf)
        y = ga.gumbel_softmax(logits, 0.3, hard, mask=mask)
    assert (y[~keep] == 0).all()
    assert (y[3] == 0).all()
    (grad,) = torch.autograd.grad((y * torch.randn(8)).sum(), logits)
    assert grad.isfinite().all()
    assert (grad[~keep] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be a finite number > 0"),
        ({"tau": float("nan")}, ValueError, "got nan"),
        ({"tau": torch.ones(2)}, ValueError, r"tau must have shape \(\), \(1,\) or \(3,\)"),
        ({"tau": torch.ones((), dtype=torch.int64)}, TypeError, "floating point"),
        ({"noise": "laplace"}, ValueError, "noise must be one of"),
        ({"noise_scale": -1.0}, ValueError, "noise_scale"),
        ({"estimator": "straight_through"}, ValueError, "needs hard=True"),
        ({"hard": True, "estimator": "rebar"}, ValueError, "estimator must be one of"),
        ({"impl": "metal"}, ValueError, "impl must be one of"),
        ({"dropout_p": 1.5}, ValueError, "between 0 and 1"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(3,\)"),
        ({"sinks": [0.0, 0.0, 0.0]}, TypeError, r"sinks must be None or .* of shape \(3,\).* got list: make it"),
        ({"sinks": torch.zeros(3, dtype=torch.int64)}, TypeError, r"floating point .* got dtype torch.int64: pass"),
        ({"sinks": torch.zeros(3, device="meta")}, ValueError, "sinks must be on cpu .* got meta: move"),
        ({"attn_mask": torch.zeros(6, 8)}, ValueError, r"broadcast to \(2, 3, 6, 9\), got shape \(6, 8\)"),
        ({"attn_mask": torch.zeros(6, 9, dtype=torch.int64)}, TypeError, "bool tensor .* got torch.int64"),
        ({"attn_mask": [[True]]}, TypeError, "got list"),
        ({"seed": 2**63}, ValueError, "int64"),
        ({"seed": 1.0}, TypeError, "seed must be None, an int"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(\) or \(2,\)"),
        ({"q_offset": -1}, ValueError, "q_offset must be >= 0"),
        ({"k_offset": torch.zeros(2)}, ValueError, "k_offset must be an int or an int64"),
        ({"h_offset": 2}, ValueError, "h_total"),
        ({"h_offset": 2, "h_total": 4}, ValueError, "h_offset <= h_total - 3"),
        ({"key": torch.randn(2, 3, 9, 5)}, ValueError, "same last dimension"),
        ({"key": torch.randn(2, 3, 8, 4)}, ValueError, "key and value must have the same length"),
        ({"key": torch.randn(2, 3, 9, 4).half()}, TypeError, "share a dtype"),
        ({"query": torch.randn(2, 6, 6, 4)}, ValueError, "needs enable_gqa=True"),
        ({"query": torch.randn(2, 4, 6, 4), "enable_gqa": True}, ValueError, "a multiple of key heads"),
        ({"query": torch.randn(6, 4)}, ValueError, "number .* of dimensions"),
        ({"key": torch.randn(2, 3, 0, 4), "value": torch.randn(2, 3, 0, 4)}, ValueError, "at least one key"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": torch.zeros(2, 3, 6, 4, dtype=torch.int64)}, TypeError, "floating point dtype"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    q, k, v = qkv(2, 3, dtype=torch.float32)
    with pytest.raises(error, match=message):
        ga.gumbel_attention(**{"query": q, "key": k, "value": v, **change})  # type: ignore[arg-type]


def test_unknown_arguments_and_devices() -> None:
    q, k, v = qkv(2, 3, dtype=torch.float32)
    with pytest.raises(TypeError, match="temperature"):
        ga.gumbel_attention(q, k, v, temperature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="on one device"):
        ga.gumbel_attention(q, k.to("meta"), v)
    with pytest.raises(ValueError, match="at least one dimension"):
        ga.gumbel_softmax(torch.tensor(1.0))


@pytest.mark.parametrize("impl", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("noise", ["none", "gumbel"])
@pytest.mark.parametrize("hard", [False, True])
def test_shapes_on_meta(hard: bool, noise: str, impl: str) -> None:
    q, k, v = (x.to("meta").requires_grad_() for x in qkv(2, 3, dtype=torch.float32))
    out = ga.gumbel_attention(q, k, v, is_causal=True, dropout_p=0.1, hard=hard, noise=noise, impl=impl)
    assert out.is_meta
    assert out.shape == (2, 3, 6, 5)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
    info = ga.gumbel_attention_with_info(q, k, v, hard=True, noise=noise)
    assert info.weights is not None
    assert info.indices is not None
    assert (info.weights.shape, info.indices.shape) == ((2, 3, 6, 9), (2, 3, 6))
    assert ga.gumbel_softmax(k, hard=hard, noise=noise).shape == k.shape


@pytest.mark.parametrize("noise", ["none", "gumbel"])
@pytest.mark.parametrize("hard", [False, True])
def test_second_derivatives_of_a_hard_choice_and_vmap_are_refused(hard: bool, noise: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 2))
    out = ga.gumbel_attention(q, k, v, hard=hard, noise=noise).square().sum()
    if hard:
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(out, q, create_graph=True)
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(lambda x: ga.gumbel_attention(x, x, x, hard=True, noise="none"))(k)
    else:
        (grad,) = torch.autograd.grad(out, q, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), q)
        assert second.isfinite().all()
