"""From the arguments of a call to a checked problem: shapes, masks, the seed."""

from __future__ import annotations

import contextlib
import math
from typing import TypedDict

import torch
from torch import Tensor

from . import checks
from .checks import Number
from .choice import Choice
from .config import DEFAULT_SAMPLES, IMPLS, check_choice, check_positive, choose
from .impl.problem import AttentionProblem, compute_dtype
from .noise import Coordinates, draw_seed


class AttentionSettings(TypedDict, total=False):
    """The keyword arguments that attention takes beyond scaled_dot_product_attention's."""

    tau: Number
    hard: bool
    noise: str
    noise_scale: Number
    estimator: str | None
    samples: int | None
    top_k: int | None
    softcap: float | None
    sinks: Tensor | None
    seed: int | Tensor | None
    q_offset: int | Tensor
    k_offset: int | Tensor
    h_offset: int
    h_total: int | None
    impl: str


def attention_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    tau: Number = 1.0,
    hard: bool = False,
    noise: str = "gumbel",
    noise_scale: Number = 1.0,
    estimator: str | None = None,
    samples: int | None = None,
    top_k: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    seed: int | Tensor | None = None,
    q_offset: int | Tensor = 0,
    k_offset: int | Tensor = 0,
    h_offset: int = 0,
    h_total: int | None = None,
    impl: str = "auto",
) -> AttentionProblem:
    """The problem that an implementation solves; the arguments are those of ``gumbel_attention_with_info``.

    Raises:
        TypeError, ValueError: an argument is out of range or does not fit; the message says what was expected.
    """
    check_choice(hard, noise, estimator, samples, top_k)
    choose("impl", impl, IMPLS)
    checks.check_dropout(dropout_p)
    query, key, value = _autocast(query, key, value)
    checks.check_qkv(query, key, value, enable_gqa)
    q, k, v = _as_4d(query), _as_4d(key), _as_4d(value)
    (batch, heads, q_len, _), k_len = q.shape, k.shape[-2]

    checks.check_choice_numbers(tau, noise_scale, estimator, heads)
    checks.check_offset("q_offset", q_offset, batch)
    checks.check_offset("k_offset", k_offset, batch)
    checks.check_head_shard(h_offset, h_total, heads)
    if softcap is not None:
        check_positive("softcap", softcap)
    _check_sinks(sinks, heads, query.device)
    keep = bias = None
    if attn_mask is not None:
        checks.check_mask("attn_mask", attn_mask, (*query.shape[:-1], k_len), query.device)
        mask = _mask_as_4d(attn_mask, query.shape[:-2])
        keep, bias = takes_part(mask), None if mask.dtype == torch.bool else mask

    where = None
    if draws(noise, noise_scale) or dropout_p > 0.0:
        drawn = draw_seed(device=query.device) if seed is None else checks.as_seed(seed, batch, query.device)
        where = Coordinates(drawn, batch, heads, q_len, k_len, q_offset, k_offset, h_offset, h_total)
    return AttentionProblem(
        query=q,
        key=k,
        value=v,
        keep=keep,
        bias=bias,
        is_causal=is_causal,
        q_offset=q_offset,
        k_offset=k_offset,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=float(dropout_p),
        seed_given=seed is not None,
        choice=make_choice(tau, hard, noise, noise_scale, where, compute_dtype(q.dtype), estimator, samples, top_k),
    )


def draws(noise: str, noise_scale: Number) -> bool:
    """Whether there is noise to add; a tensor's value is not read."""
    return noise != "none" and (isinstance(noise_scale, Tensor) or noise_scale > 0)


def make_choice(
    tau: Number,
    hard: bool,
    noise: str,
    noise_scale: Number,
    where: Coordinates | None,
    dtype: torch.dtype,
    estimator: str | None = None,
    samples: int | None = None,
    top_k: int | None = None,
) -> Choice:
    """The choice with tau and noise_scale in ``dtype`` and shapes that broadcast; noise that adds nothing left out."""

    def per_head(x: Number) -> Number:
        return x.to(dtype).reshape(1, -1, 1, 1) if isinstance(x, Tensor) else x

    return Choice(
        tau=per_head(tau),
        hard=hard,
        noise=noise if draws(noise, noise_scale) else "none",
        noise_scale=per_head(noise_scale),
        where=where,
        estimator=estimator or "straight_through",
        samples=samples or DEFAULT_SAMPLES,
        top_k=top_k,
    )


def takes_part(mask: Tensor) -> Tensor:
    """Which entries of a bool or additive mask take part: all but those <= finfo.min / 2, NaN among them."""
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min / 2)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; it never is for one that has none, such as meta."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off for a device."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def _check_sinks(sinks: object, heads: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless ``sinks`` is ``None`` or a float tensor (heads,) on ``device``."""
    if sinks is None:
        return
    wanted = f"a floating point tensor of shape ({heads},), one score for each head"
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be None or {wanted}, got {type(sinks).__name__}: make it a torch.tensor.")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be {wanted}, got dtype {sinks.dtype}: pass sinks.float().")
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), one for each head, got {tuple(sinks.shape)}.")
    if sinks.device != device:
        raise ValueError(f"sinks must be on {device} as the query is, got {sinks.device}: move them there.")


def _as_4d(x: Tensor) -> Tensor:
    """(..., H, L, D) as (B, H, L, D): one head and one example where there are none."""
    x = x.reshape(*(1,) * (4 - x.ndim), *x.shape)
    return x.flatten(0, -4)


def _mask_as_4d(mask: Tensor, lead: torch.Size) -> Tensor:
    """A mask that broadcasts to (*lead, Lq, Lk) as one that broadcasts to (B, H, Lq, Lk)."""
    mask = mask.reshape(*(1,) * (len(lead) + 2 - mask.ndim), *mask.shape)
    if len(lead) > 2:
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
    return _as_4d(mask)


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as scaled_dot_product_attention takes them."""
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        checks.check_tensor(name, x)
    if not autocasts(query.device) or any(x.dtype == torch.float64 for x in named.values()):
        return query, key, value
    return tuple(x.to(torch.get_autocast_dtype(query.device.type)) for x in named.values())
