"""Controls of hard attention: heads whose choice no input can change.

Every query of every head attends to one key: the first it sees, its own position, or one that was drawn once for the
layer, head and query. Drawn is a share of the keys that are seen, so that it stays inside texts of any length. All
else of the model trains as ever: what such a model reaches takes no choice.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from harness.errors import UsageError

LONGEST = 4096
"""Query positions for which a key is drawn."""
_SEED = 20_000
KINDS = ("first", "own", "random")
_drawn: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def fix_keys(model: Any, kind: str, seed: int = 0) -> None:
    """Fixes the choice of all attention layers of a model, for good.

    Args:
        model: of transformers, not patched.
        kind: ``"first"``, ``"own"`` or ``"random"``.
        seed: of ``"random"``; of one seed, models of the same sizes have the same keys.

    Raises:
        UsageError: the model does not let its attention be exchanged.
    """
    if kind not in KINDS:
        raise UsageError(f"fixed_keys must be one of {', '.join(KINDS)}, got {kind!r}.")
    try:
        model.set_attn_implementation(_name(kind))
    except (AttributeError, ValueError) as error:
        raise UsageError(f"fixed_keys={kind}: {type(model).__name__} has no attention to exchange: {error}") from error
    for number, module in enumerate(model.modules()):
        heads = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
        if isinstance(heads, int):
            drawing = torch.Generator().manual_seed(_SEED * (seed + 1) + number)
            _drawn[module] = torch.rand(heads, LONGEST, generator=drawing)


def chosen_keys(kind: str, visible: Tensor, shares: Tensor | None = None) -> Tensor:
    """The key of each query.

    Args:
        kind: as for :func:`fix_keys`.
        visible: bool (B, H, Lq, Lk).
        shares: of ``"random"``: in [0, 1), (H, Lq), how far among the keys that a query sees its own lies.

    Returns:
        int64 (B, H, Lq); of a query that sees no key, any.
    """
    batch, heads, q_len, k_len = visible.shape
    if kind == "own":
        return (torch.arange(q_len, device=visible.device) + (k_len - q_len)).expand(batch, heads, q_len)
    order = visible.cumsum(-1)
    count = order[..., -1]
    if kind == "first":
        wanted = torch.ones_like(count)
    else:
        assert shares is not None
        wanted = 1 + (shares * count).long()
    return (order == wanted[..., None]).int().argmax(-1)  # the first of equal ones: there the count went up


def _attend(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **other: object,
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers; ``other`` would change the scores, of which there are none."""
    shape = (*query.shape[:3], key.shape[2])
    if attention_mask is None:
        visible = torch.ones(shape, dtype=torch.bool, device=query.device)
        if getattr(module, "is_causal", False):
            visible = visible.tril(shape[3] - shape[2])
    else:
        mask = attention_mask[..., : shape[3]]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        visible = seen.expand(shape)
    shares = _drawn[module][:, : shape[2]].to(query.device) if kind == "random" else None
    keys = chosen_keys(kind, visible, shares)
    weights = nn.functional.one_hot(keys, shape[3]).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    of_heads = value.repeat_interleave(shape[1] // value.shape[1], dim=1)
    return (weights @ of_heads).transpose(1, 2).contiguous(), weights


def _name(kind: str) -> str:
    return f"fixed_key_{kind}"


def _register(kind: str) -> None:
    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _attend(kind, *args, **kwargs)

    AttentionInterface.register(_name(kind), attend)
    AttentionMaskInterface.register(_name(kind), eager_mask)


for _kind in KINDS:
    _register(_kind)
