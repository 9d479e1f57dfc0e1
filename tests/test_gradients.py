"""Gradients: against finite differences where the value is differentiable, against the written formula where not."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import gumbel_attention as ga

CASES = [
    (mask, gqa, tau)
    for (mask, gqa), tau in itertools.product([("none", 1), ("bool", 2), ("float", 1), ("causal", 2)], [0.3, 3.0])
]


def inputs(mask: str, group: int) -> tuple[list[Tensor], Tensor | None]:
    q = torch.randn(2, 2 * group, 3, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 1, 3, 5) > 0.4
    keep[0, 0, 1] = False  # a row without keys
    bias = torch.randn(2 * group, 3, 5, dtype=torch.float64).masked_fill(torch.rand(3, 5) > 0.7, -math.inf)
    return [q, k, v], {"bool": keep, "float": bias}.get(mask)


@pytest.mark.parametrize(
    ("mask", "group", "tau", "noise"),
    [(*case, "gumbel") for case in CASES] + [("bool", 1, 0.7, "none"), ("bool", 1, 0.7, "normal")],
)
def test_gradcheck_of_the_relaxation(mask: str, group: int, tau: float, noise: str) -> None:
    qkv, attn_mask = inputs(mask, group)
    heads = 2 * group
    taus = torch.full((heads,), tau, dtype=torch.float64, requires_grad=True)
    scale = torch.full((heads,), 0.8, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        info = ga.gumbel_attention_with_info(
            q, k, v, attn_mask, is_causal=mask == "causal", enable_gqa=True, dropout_p=0.2,
            tau=t, noise=noise, noise_scale=s, seed=5,
        )  # fmt: skip
        return info.output, info.weights

    if noise == "none":
        scale.requires_grad_(False)
    assert torch.autograd.gradcheck(attend, (*qkv, taus, scale))


def test_gradcheck_of_bias_softcap_and_sinks() -> None:
    (q, k, v), _ = inputs("none", 1)
    bias = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return ga.gumbel_attention(q, k, v, bias, softcap=1.5, sinks=sinks, tau=0.7, seed=2)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, sinks))


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_gradcheck_of_log_prob(mask: str) -> None:
    (q, k, v), attn_mask = inputs(mask, 1)
    noise_scale = torch.tensor(0.7, dtype=torch.float64)

    def log_prob(q: Tensor, k: Tensor) -> Tensor:
        info = ga.gumbel_attention_with_info(q, k, v, attn_mask, hard=True, noise_scale=noise_scale, seed=2)
        assert info.log_prob is not None
        return info.log_prob

    assert torch.autograd.gradcheck(log_prob, (q, k))


@pytest.mark.parametrize(("mask", "group", "tau"), CASES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_straight_through_is_the_written_gradient(mask: str, group: int, tau: float, dropout_p: float) -> None:
    """dZ = P * (dP - delta) with delta = dO . (P V), not dO . O_hard; dV from the one-hot; all in float64."""
    (q, k, v), attn_mask = inputs(mask, group)
    heads, scale, c = 2 * group, 0.6, 0.9
    taus = torch.full((heads,), tau, dtype=torch.float64, requires_grad=True)
    cs = torch.full((heads,), c, dtype=torch.float64, requires_grad=True)
    bias = attn_mask.requires_grad_() if mask == "float" and attn_mask is not None else None
    settings = {"scale": scale, "is_causal": mask == "causal", "enable_gqa": True, "dropout_p": dropout_p, "seed": 5}
    info = ga.gumbel_attention_with_info(q, k, v, attn_mask, hard=True, tau=taus, noise_scale=cs, **settings)
    soft = ga.gumbel_attention_with_info(q, k, v, attn_mask, tau=taus, noise_scale=cs, **settings)
    d_out = torch.randn_like(info.output)
    wanted = [q, k, v, taus, cs] + ([] if bias is None else [bias])
    got = torch.autograd.grad(info.output, wanted, d_out)

    full = {**settings, "dropout_p": 0.0}
    p = ga.gumbel_attention_with_info(q, k, v, attn_mask, tau=taus, noise_scale=cs, **full).weights.detach()
    dropped_p = soft.weights.detach()
    factor = torch.where(p > 0, dropped_p / p, 0.0)
    k_all, v_all = (x.detach().repeat_interleave(group, 1) for x in (k, v))
    d_p = (d_out @ v_all.mT) * factor
    delta = (d_out * (dropped_p @ v_all)).sum(-1, keepdim=True)
    d_z = p * (d_p - delta)
    g = ga.noise.sample("gumbel", ga.noise.Coordinates(torch.tensor(5), 2, heads, 3, 5))
    scores = scale * q.detach() @ k_all.mT + (0.0 if bias is None else bias.detach())
    z = (scores + c * g) / tau
    one_hot = info.weights.detach()
    want = [
        scale / tau * d_z @ k_all,
        (scale / tau * d_z.mT @ q.detach()).unflatten(1, (-1, group)).sum(2),
        (one_hot.mT @ d_out).unflatten(1, (-1, group)).sum(2),
        -(d_z * z.masked_fill(p == 0, 0.0)).sum((0, 2, 3)) / tau,
        (d_z * g).sum((0, 2, 3)) / tau,
        d_z.sum(0) / tau,
    ]
    for name, a, b in zip(("dQ", "dK", "dV", "dtau", "dnoise_scale", "dbias"), got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")

    wrong_delta = (d_out * info.output.detach()).sum(-1, keepdim=True)  # the control: the well-known mistake
    wrong_q = scale / tau * (p * (d_p - wrong_delta)) @ k_all
    assert (wrong_q - got[0]).abs().max() > 1e-3


def test_weight_level_straight_through_differs_from_output_level() -> None:
    (q, k, v), _ = inputs("none", 1)
    hard = ga.gumbel_attention(q, k, v, hard=True, seed=1)
    soft = ga.gumbel_attention(q, k, v, seed=1)
    d_out = torch.randn_like(hard)
    for x, share in ((q, 0.0), (k, 0.0), (v, 0.583)):
        (weight_level,) = torch.autograd.grad(hard, x, d_out, retain_graph=True)
        (output_level,) = torch.autograd.grad(soft, x, d_out, retain_graph=True)
        difference = ((weight_level - output_level).norm() / weight_level.norm()).item()
        assert difference == pytest.approx(share, abs=5e-4)


def test_returned_weights_pass_the_relaxations_gradient() -> None:
    (q, k, v), _ = inputs("none", 1)
    target = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    hard = ga.gumbel_attention_with_info(q, k, v, hard=True, seed=1).weights
    soft = ga.gumbel_attention_with_info(q, k, v, seed=1).weights
    torch.testing.assert_close(torch.autograd.grad(hard, q, target), torch.autograd.grad(soft, q, target))


def test_gumbel_softmax_passes_the_relaxations_gradient() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: ga.gumbel_softmax(x, t, seed=3), (logits, tau))
    weight = torch.randn(4, 6, dtype=torch.float64)
    soft = torch.autograd.grad((ga.gumbel_softmax(logits, tau, seed=3) * weight).sum(), (logits, tau))
    hard = torch.autograd.grad((ga.gumbel_softmax(logits, tau, True, seed=3) * weight).sum(), (logits, tau))
    torch.testing.assert_close(hard, soft)
