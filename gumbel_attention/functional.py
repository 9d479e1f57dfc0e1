"""Gumbel-softmax and Gumbel attention as functions: check the arguments, draw the seed, pick the implementation."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import checks
from .arguments import AttentionSettings, attention_problem, draws, make_choice, takes_part, without_autocast
from .checks import Number
from .config import check_choice
from .dispatch import Explanation, choose_implementation, compute, compute_with_choice
from .estimators import choose
from .impl.problem import AttentionInfo, compute_dtype
from .noise import Coordinates, draw_seed

__all__ = [
    "AttentionInfo",
    "AttentionSettings",
    "Explanation",
    "SoftmaxInfo",
    "explain",
    "gumbel_attention",
    "gumbel_attention_with_info",
    "gumbel_softmax",
    "gumbel_softmax_with_info",
]


class SoftmaxInfo(NamedTuple):
    """The result of :func:`gumbel_softmax_with_info`.

    Attributes:
        weights: the shape and dtype of the logits; sums to 1, or to 0 where nothing takes part.
        indices: int64, the logits' shape without ``dim``, and with ``top_k`` one more dimension for the keys at the
            end, the best first; -1 where none is left. ``None`` for a soft choice.
        log_prob: the logits' shape without ``dim``: log softmax(logits / noise_scale) of the choice, differentiable;
            with ``top_k`` that of the keys in their order. ``None`` unless the choice is hard and the noise Gumbel's.
    """

    weights: Tensor
    indices: Tensor | None
    log_prob: Tensor | None


def gumbel_softmax(
    logits: Tensor,
    tau: Number = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    noise: str = "gumbel",
    noise_scale: Number = 1.0,
    mask: Tensor | None = None,
    estimator: str | None = None,
    samples: int | None = None,
    top_k: int | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    r"""A relaxed or hard sample of Categorical(softmax(logits)) along ``dim``.

    .. math:: y = \mathrm{softmax}((\mathrm{logits} + c\,G) / \tau), \qquad G \sim \mathrm{Gumbel}(0, 1)

    and with ``hard`` the one-hot of its largest entry, with the gradient of ``y`` (Jang et al. 2017, Maddison et
    al. 2017). Takes the place of :func:`torch.nn.functional.gumbel_softmax` argument for argument. Unlike it: the
    noise is float32 also for half precision logits, so that their frequencies are right; it is never infinite; masked
    entries get exactly 0, and so does a row of which nothing is left; the hard sample is exactly one-hot; the
    noise has a seed, and can be switched off.

    Args:
        logits: (..., n), floating point. Entries of -inf (any <= finfo.min / 2) do not take part; NaN does.
        tau: temperature, > 0: a number or a tensor of shape () or (1,).
        hard: return a one-hot sample.
        eps: ignored; torch ignores it too.
        dim: the dimension of the categories.
        noise: ``"gumbel"``, ``"normal"``, ``"logistic"`` or ``"none"``.
        noise_scale: c, multiplies the noise: a number >= 0 or a tensor of shape () or (1,).
        mask: broadcasts to the logits; bool (True takes part) or floating point (added to them).
        estimator: how the gradient passes a hard sample: ``"straight_through"`` (the default when ``hard``),
            ``"gumbel_rao"``, ``"reinmax"`` (tau >= 1), ``"score_function"``, or ``"noisy_gradient"``, which takes the
            largest logit and has the noise in the gradient only; see :mod:`gumbel_attention.estimators`.
        samples: K of ``"gumbel_rao"``; ``None`` is 10.
        top_k: choose this many categories without replacement, with equal weights; soft: the relaxation of that.
        seed: the noise's seed; ``None`` draws one from torch's default generator. The noise of an entry depends on
            the seed and its index alone: the last two dimensions, ``dim`` moved last, are its (query, key)
            position, the others its head.

    Returns:
        The shape and dtype of ``logits``.

    Raises:
        TypeError, ValueError: an argument is out of range or does not fit; the message says what was expected.
    """
    return gumbel_softmax_with_info(
        logits,
        tau,
        hard,
        eps,
        dim,
        noise=noise,
        noise_scale=noise_scale,
        mask=mask,
        estimator=estimator,
        samples=samples,
        top_k=top_k,
        seed=seed,
    ).weights


def gumbel_softmax_with_info(
    logits: Tensor,
    tau: Number = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    noise: str = "gumbel",
    noise_scale: Number = 1.0,
    mask: Tensor | None = None,
    estimator: str | None = None,
    samples: int | None = None,
    top_k: int | None = None,
    seed: int | Tensor | None = None,
) -> SoftmaxInfo:
    """:func:`gumbel_softmax`, with the categories chosen and their log-probability.

    Returns:
        :class:`SoftmaxInfo`.

    Raises:
        TypeError, ValueError: as :func:`gumbel_softmax`.
    """
    checks.check_tensor("logits", logits)
    check_choice(hard, noise, estimator, samples, top_k)
    checks.check_choice_numbers(tau, noise_scale, estimator, 1)
    if logits.ndim == 0:
        raise ValueError("logits must have at least one dimension, got a scalar.")
    if mask is not None:
        checks.check_mask("mask", mask, logits.shape, logits.device)

    moved = logits.movedim(dim, -1)
    rows = moved[None] if moved.ndim == 1 else moved
    flat_shape = (1, math.prod(rows.shape[:-2]), *rows.shape[-2:])
    scores, keep = logits.to(compute_dtype(logits.dtype)), takes_part(logits)
    if mask is not None:
        keep = keep & takes_part(mask)
        scores = scores if mask.dtype == torch.bool else scores + mask
    drawn = None
    if draws(noise, noise_scale):
        key = draw_seed(device=logits.device) if seed is None else checks.as_seed(seed, 1, logits.device).reshape(())
        drawn = Coordinates(key, *flat_shape)
    dtype = compute_dtype(logits.dtype)
    choice = make_choice(tau, hard, noise, noise_scale, drawn, dtype, estimator, samples, top_k)

    def rows_of(x: Tensor) -> Tensor:
        return x.movedim(dim, -1).reshape(flat_shape)

    chosen = choose(rows_of(scores), rows_of(keep), choice)
    weights = chosen.weights.reshape(moved.shape).movedim(-1, dim).to(logits.dtype)
    lead, indices, log_prob = moved.shape[:-1], chosen.indices, chosen.log_prob
    if indices is not None:
        indices = indices.reshape(lead if top_k is None else (*lead, top_k))
    return SoftmaxInfo(weights, indices, None if log_prob is None else log_prob.reshape(lead))


def gumbel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **settings: Unpack[AttentionSettings],
) -> Tensor:
    """Attention whose softmax is a Gumbel-softmax, or a hard choice with a straight-through gradient.

    :func:`torch.nn.functional.scaled_dot_product_attention` with the same arguments in the same order and with the
    same meaning, and the settings of :func:`gumbel_attention_with_info`, whose output this is. ``impl`` may be
    ``"auto"``, ``"sdpa"``, ``"triton"``, ``"cpu"``, ``"blockwise"`` or ``"reference"``; memory grows linearly with the
    lengths in all but ``"reference"`` and, with dropout on the CPU, torch's own ``"sdpa"``. :func:`explain` tells what
    ``"auto"`` takes.

    Returns:
        (..., q_len, v_dim), the dtype of the query.
    """
    problem = attention_problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **settings)
    name = choose_implementation(problem, settings.get("impl", "auto")).impl
    with without_autocast(query.device):
        output = compute(problem, name)
    return output.reshape(*query.shape[:-1], output.shape[-1])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **settings: Unpack[AttentionSettings],
) -> Explanation:
    """Which implementation :func:`gumbel_attention` would run with these arguments, and why not the others.

    Raises:
        TypeError, ValueError: as that call would.
    """
    seed_given = settings.get("seed") is not None
    if not seed_given:
        settings["seed"] = 0  # so that nothing is drawn
    problem = attention_problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **settings)
    problem = dataclasses.replace(problem, seed_given=seed_given)
    return choose_implementation(problem, settings.get("impl", "auto"))


def gumbel_attention_with_info(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    need_weights: bool = True,
    **settings: Unpack[AttentionSettings],
) -> AttentionInfo:
    r"""Gumbel attention together with the weights used, the keys chosen and their log-probability.

    .. math::
        Z = (S + c\,G) / \tau, \quad S = \mathrm{scale}\,Q K^T + \mathrm{mask}, \quad P = \mathrm{softmax}(Z), \quad
        O = P V \;\text{ or, hard, }\; O = V[\arg\max Z]

    The gradient of a hard choice is that of weights ``onehot - stop_gradient(P) + P``, or of what the estimator puts
    in the place of P: V receives what the one-hot sends it, Q and K what P does. (Straight-through on the output
    instead would send V the gradient of P.)

    Args:
        query: (..., H, q_len, D).
        key: (..., Hk, k_len, D).
        value: (..., Hk, k_len, Dv). Keys and values that no query sees never reach an output.
        attn_mask: broadcasts to (..., H, q_len, k_len); bool (True takes part) or floating point (added to the
            scores; an entry <= finfo.min / 2 does not take part, NaN does). A row in which nothing takes part gives
            0.
        dropout_p: dropout of the weights used, by the noise's own counter: the seed repeats it. After a hard
            choice it zeroes whole outputs.
        is_causal: query ``q + q_offset`` sees key ``k + k_offset`` iff it is not later; goes together with a mask.
        scale: multiplies the scores; ``None`` is 1 / sqrt(D).
        enable_gqa: H may be a multiple of Hk. The noise is drawn for each query head.
        tau: temperature, > 0: a number, or a tensor of shape (), (1,) or (H,), which receives its gradient.
        hard: each query takes the value of one key.
        need_weights: give the weights. Without them memory grows linearly with the lengths.
        noise: ``"gumbel"``, ``"normal"`` or ``"logistic"`` (of the same variance), or ``"none"``.
        noise_scale: c, >= 0, in the same forms as ``tau``.
        estimator: how the gradient passes a hard choice: ``"straight_through"`` (the default when ``hard``),
            ``"gumbel_rao"``, ``"reinmax"`` (tau >= 1), ``"score_function"``, or ``"noisy_gradient"``, which takes the
            key of the largest score and has the noise in the gradient only; see :mod:`gumbel_attention.estimators`.
        samples: K of ``"gumbel_rao"``; ``None`` is 10.
        top_k: attend to this many keys, chosen without replacement, with equal weights; soft: the relaxation of that.
        softcap: scores become ``softcap * tanh(scores / softcap)``, before the mask.
        sinks: (H,) scores of a column that takes part in softmax and noise like any key (at key position
            2^32 - 1), but has no value: attention to it gives 0. Neither scaled nor capped.
        seed: an int, an int64 tensor of shape (), or one of shape (B,) that gives each example its own noise
            wherever it stands in the batch. ``None`` draws one from torch's default generator.
        q_offset: position of the first query: an int, or int64 of shape (B,).
        k_offset: position of the first key, likewise.
        h_offset: the first head, where these heads are a shard of a layer's.
        h_total: the number of heads of that layer; needed for a shard.
        impl: ``"auto"`` or ``"reference"``, and without weights ``"blockwise"``; ``"sdpa"``, ``"triton"`` and
            ``"cpu"`` give an output only, by :func:`gumbel_attention`.

    Returns:
        :class:`AttentionInfo`.

    Raises:
        TypeError, ValueError: an argument is out of range or does not fit; the message says what was expected.
    """
    problem = attention_problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **settings)
    name = choose_implementation(problem, settings.get("impl", "auto"), need_weights, need_choice=True).impl
    with without_autocast(query.device):
        info = compute_with_choice(problem, name)
    if not need_weights:
        info = info._replace(weights=None)
    lead = query.shape[:-2]

    def as_given(x: Tensor) -> Tensor:
        return x if x.shape[:2] == lead else x.reshape(*lead, *x.shape[2:])

    rest = (None if x is None else as_given(x) for x in info[1:])
    return AttentionInfo(as_given(info.output), *rest)


_function: Any
for _function in (gumbel_attention, gumbel_attention_with_info, explain):  # so that help() shows every setting
    _returns = inspect.signature(_function).return_annotation
    _own = [p for p in inspect.signature(_function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    _full = inspect.signature(attention_problem)
    _function.__signature__ = _full.replace(parameters=[*_full.parameters.values(), *_own], return_annotation=_returns)
