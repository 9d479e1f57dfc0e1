"""What every implementation takes and gives: checked, four-dimensional arguments and the result."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..choice import Choice
from ..noise import positions


class AttentionInfo(NamedTuple):
    """The result of attention together with what was chosen.

    Attributes:
        output: (..., q_len, v_dim), the dtype of the query.
        weights: (..., q_len, k_len), the weights actually used, after dropout; one-hot where the choice is hard.
            ``None``, like what follows, where only the output was asked for.
        indices: (..., q_len) int64, the chosen key, or with ``top_k`` (..., q_len, top_k) the keys, the best first; -1
            where no key is left or the sink was chosen. ``None`` for a soft choice.
        log_prob: (..., q_len), log softmax(scores / noise_scale) of the choice, 0 where no key takes part, with
            ``top_k`` that of the keys in their order; differentiable. ``None`` unless the choice is hard and the noise
            is Gumbel's: only then is the choice a sample of that distribution.
    """

    output: Tensor
    weights: Tensor | None
    indices: Tensor | None
    log_prob: Tensor | None


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """Checked arguments of one attention call.

    query (B, H, Lq, D), key (B, Hk, Lk, D), value (B, Hk, Lk, Dv) with Hk dividing H, one dtype and device;
    ``keep`` bool (True takes part) and ``bias`` float (added to the scores) broadcast against (B, H, Lq, Lk).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    bias: Tensor | None
    is_causal: bool
    q_offset: int | Tensor
    k_offset: int | Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    seed_given: bool
    choice: Choice

    def visible(self, rows: slice = slice(None)) -> Tensor | None:
        """Which keys the queries in ``rows`` see: bool, broadcasts against (B, H, rows, Lk); ``None`` for all."""
        keep = self.keep
        if keep is not None and keep.shape[-2] > 1:
            keep = keep[..., rows, :]
        if not self.is_causal:
            return keep
        q, k = self._positions()
        causal = (q[:, rows, None] >= k[:, None, :])[:, None]
        return causal if keep is None else keep & causal

    def seen_keys(self) -> Tensor | None:
        """Which keys any query sees: bool, broadcasts against (B, H, Lk); ``None`` for all."""
        keep = self.keep
        if not self.is_causal:
            return None if keep is None else keep.any(dim=-2)
        if self.query.shape[-2] == 0:
            return torch.zeros(1, 1, self.key.shape[-2], dtype=torch.bool, device=self.query.device)
        q, k = self._positions()
        if keep is None or keep.shape[-2] == 1:
            reached = (k <= q[:, -1:])[:, None]
            return reached if keep is None else reached & keep[..., 0, :]
        return (keep & (q[:, :, None] >= k[:, None, :])[:, None]).any(dim=-2)

    def hidden_keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, zero where no query sees them: padding may hold NaN or inf, and 0 * NaN is NaN."""
        seen = self.seen_keys()
        if seen is None:
            return self.key, self.value
        by_query_head = seen.expand(self.key.shape[0], self.query.shape[1], -1)
        hidden = ~by_query_head.unflatten(1, (self.key.shape[1], -1)).any(dim=2)[..., None]
        return self.key.masked_fill(hidden, 0.0), self.value.masked_fill(hidden, 0.0)

    def _positions(self) -> tuple[Tensor, Tensor]:
        device = self.query.device
        return (
            positions(self.q_offset, self.query.shape[-2], device),
            positions(self.k_offset, self.key.shape[-2], device),
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of noise and softmax statistics: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
