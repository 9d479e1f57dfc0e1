"""Checks of call arguments: each error says what was expected, what came, and where it helps, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import check_noise_scale, check_positive, check_tau

Number = float | Tensor


def check_tensor(name: str, x: object) -> None:
    """Raises TypeError unless ``x`` is a floating point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {x.dtype}.")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raises TypeError or ValueError unless the three tensors fit together as scaled_dot_product_attention's do."""
    named = (("query", query), ("key", key), ("value", value))

    def shapes() -> str:
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in named)

    if len({x.dtype for _, x in named}) > 1:
        raise TypeError(f"query, key and value must share a dtype, got {[x.dtype for _, x in named]}.")
    if len({x.device for _, x in named}) > 1:
        raise ValueError(f"query, key and value must be on one device, got {[str(x.device) for _, x in named]}.")
    if len({x.ndim for _, x in named}) > 1 or query.ndim < 2:
        raise ValueError(f"query, key and value must have the same number (>= 2) of dimensions, got {shapes()}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same last dimension, got {shapes()}.")
    if key.shape[-2] != value.shape[-2] or key.shape[:-2] != value.shape[:-2]:
        raise ValueError(f"key and value must have the same length and leading dimensions, got {shapes()}.")
    if key.shape[-2] == 0 or 0 in key.shape[-3:-2]:
        raise ValueError(f"there must be at least one key and one head, got {shapes()}.")
    if enable_gqa and query.ndim >= 3:
        heads, kv_heads = query.shape[-3], key.shape[-3]
        if query.shape[:-3] != key.shape[:-3] or kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"with enable_gqa, query heads must be a multiple of key heads, got {shapes()}.")
    elif query.shape[:-2] != key.shape[:-2]:
        hint = " Grouped-query attention needs enable_gqa=True." if query.ndim >= 3 else ""
        raise ValueError(f"query, key and value must have the same leading dimensions, got {shapes()}.{hint}")


def check_mask(name: str, mask: object, full: Sequence[int], device: torch.device) -> None:
    """Raises unless ``mask`` is a bool or floating point tensor that broadcasts to the shape ``full``."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} must be a bool tensor (True takes part) or a floating point one (added to the scores), "
            f"got {came}."
        )
    fits = mask.ndim <= len(full) and all(
        m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {tuple(full)}, got shape {tuple(mask.shape)}.")
    if mask.device != device:
        raise ValueError(f"{name} must be on {device}, got {mask.device}.")


def check_scalar_or_per_head(name: str, value: object, heads: int, *, zero_allowed: bool = False) -> None:
    """Raises unless ``value`` is a number in range, or a float tensor of shape (), (1,) or (heads,).

    The values of tensors are not read: that would wait for the device.
    """
    if not isinstance(value, Tensor):
        check_positive(name, value, zero_allowed=zero_allowed)
        return
    check_tensor(name, value)
    if tuple(value.shape) not in ((), (1,), (heads,)):
        raise ValueError(
            f"{name} must have shape (), (1,) or ({heads},), one for each head, got {tuple(value.shape)}."
        )


def check_choice_numbers(tau: object, noise_scale: object, estimator: str | None, heads: int) -> None:
    """Raises unless tau and noise_scale are in range, for ``estimator`` too, or tensors of a fitting shape."""
    check_scalar_or_per_head("tau", tau, heads)
    check_scalar_or_per_head("noise_scale", noise_scale, heads, zero_allowed=True)
    if not isinstance(tau, Tensor):
        check_tau(tau, estimator)
    if not isinstance(noise_scale, Tensor):
        check_noise_scale(noise_scale, estimator)


def check_dropout(p: float) -> None:
    """Raises ValueError unless ``p`` is a probability."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {p!r}.")


def as_seed(seed: object, batch: int, device: torch.device) -> Tensor:
    """``seed`` as an int64 tensor of shape () or (batch,) on ``device``.

    Raises:
        TypeError, ValueError: not an int64 value or tensor, a wrong shape, or another device.
    """
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in int64, got {seed}.")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        came = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed must be None, an int, or an int64 tensor, got {came}.")
    if tuple(seed.shape) not in ((), (batch,)):
        raise ValueError(f"seed must have shape () or ({batch},), one for each example, got {tuple(seed.shape)}.")
    if seed.device != device:
        raise ValueError(f"seed must be on {device}, got {seed.device}.")
    return seed


def check_offset(name: str, offset: object, batch: int) -> None:
    """Raises unless ``offset`` is an int >= 0 or an int64 tensor (batch,)."""
    if isinstance(offset, Tensor):
        if offset.dtype != torch.int64 or tuple(offset.shape) != (batch,):
            raise ValueError(
                f"{name} must be an int or an int64 tensor of shape ({batch},), "
                f"got {offset.dtype} {tuple(offset.shape)}."
            )
    elif isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(offset).__name__}.")
    elif offset < 0:
        raise ValueError(f"{name} must be >= 0, got {offset}.")


def check_head_shard(h_offset: int, h_total: int | None, heads: int) -> None:
    """Raises ValueError unless heads ``h_offset ... h_offset + heads`` lie within ``h_total``."""
    if h_total is None and h_offset == 0:
        return
    if h_total is None or h_offset < 0 or h_offset + heads > h_total:
        raise ValueError(
            f"a shard of heads needs h_total, the number of heads of the whole layer, and "
            f"0 <= h_offset <= h_total - {heads}; got h_offset={h_offset}, h_total={h_total}."
        )


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raises ValueError unless ``num_heads`` heads of equal width make up ``embed_dim``."""
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads, got embed_dim={embed_dim} and num_heads={num_heads}."
        )


def check_dims(**inputs: Tensor) -> None:
    """Raises ValueError unless the tensors are all 3-D or all 2-D."""
    if {x.ndim for x in inputs.values()} not in ({2}, {3}):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"query, key and value must all be 3-D, or all 2-D without a batch, got {shapes}.")


def check_shape(name: str, x: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raises ValueError unless ``x`` has the expected sizes; ``None`` allows any."""
    fits = x.ndim == len(expected) and all(e in (None, s) for e, s in zip(expected, x.shape, strict=True))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must be {meaning} = ({sizes}), got {tuple(x.shape)}.")


def check_torch_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless ``mask`` is one of torch's MultiheadAttention, of one of the shapes."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool (True is masked out) or floating point (added to the scores), got {mask.dtype}."
        )
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}.")
