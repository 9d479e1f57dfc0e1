"""The child module that rewritten attention asks for its softmax."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import autocasts, draws, make_choice, takes_part
from ..attend import attend
from ..choice import Choice, masked_softmax
from ..config import GumbelAttentionConfig
from ..estimators import choose
from ..impl.problem import AttentionProblem, compute_dtype
from ..noise import Coordinates, draw_seed
from .patched_state import PatchedState
from .rewriting import original, rewritten

IMPLS = ("auto", "reference")
_HEADS_NOT_IN_PLACE = re.compile(r"Longformer\w*Attention|LEDEncoderSelfAttention")


class SoftmaxState(PatchedState):
    """The state of a module whose methods are rewritten, and what they call.

    Args:
        config: the settings.
        num_heads: query heads of the module.
        module: the module it is for.

    Raises:
        ValueError: the module has no softmax to replace, or a setting that needs what a softmax alone cannot give.
    """

    way = "rewrite"

    def __init__(self, config: GumbelAttentionConfig, num_heads: int, module: nn.Module) -> None:
        super().__init__(config, num_heads, module)
        name = type(module).__name__
        if config.impl not in IMPLS and self.way == "rewrite":
            raise ValueError(
                f"impl={config.impl!r} computes whole attention, but {name} computes its scores itself; expected one "
                f"of {IMPLS}."
            )
        if self._per_head and _HEADS_NOT_IN_PLACE.fullmatch(name):
            raise ValueError(
                f"heads= and learn_tau='head' need scores of shape (B, H, Q, K) or (B*H, Q, K); those of {name} are "
                "laid out by windows."
            )
        rewritten(type(module))  # raises here, before anything changes

    @property
    def _per_head(self) -> bool:
        return self.config.heads is not None or self.config.learn_tau == "head"

    def enter(self, module: nn.Module) -> None:
        """Becomes a child of the module, and exchanges its methods for those that ask this child."""
        super().enter(module)
        _exchange_class(module, rewritten(type(module)))

    def leave(self, module: nn.Module) -> None:
        """Puts the module's own methods back."""
        _exchange_class(module, original(type(module)))
        super().leave(module)

    def softmax(self, scores: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """What the module uses as the softmax of its scores.

        With tau 1, without noise and not hard it is torch's, but for rows that are masked wholly, which are 0.

        Args:
            scores: of at least two dimensions; entries <= finfo.min / 2 of their dtype are masked, NaN is not.
            dim: the dimension of the keys.
            dtype: as torch.softmax takes it.

        Returns:
            The shape of the scores, in the dtype that torch.softmax gives.

        Raises:
            ValueError: ``dim`` is missing, or heads are told apart and the scores do not show them.
        """
        self.note_run()
        if dim is None or scores.ndim < 2:
            raise ValueError(f"expected scores of two or more dimensions and a dim, got {tuple(scores.shape)}, {dim}.")
        visible = takes_part(scores)
        rows = (scores if dtype is None else scores.to(dtype)).movedim(dim, -1)
        exact = rows.to(compute_dtype(rows.dtype))
        shape = (1, math.prod(rows.shape[:-2]), *rows.shape[-2:])
        weights = self._weights(exact.reshape(shape), visible.movedim(dim, -1).reshape(shape), rows)
        return weights.reshape(rows.shape).movedim(-1, dim).to(_softmax_dtype(scores, dtype))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What the module uses as scaled_dot_product_attention, with the same arguments."""
        self.note_run()
        inputs = (query, key, value, attn_mask, dropout_p, is_causal, scale)
        return attend(self, self.training, *inputs, need_weights=False).output

    def _weights(self, scores: Tensor, visible: Tensor, rows: Tensor) -> Tensor:
        """Weights (1, N, Q, K) of scores in that shape; ``rows`` is the shape they came in."""
        settings = self.arguments(self.training)
        tau, noise, scale = settings["tau"], settings["noise"], settings.get("noise_scale", 1.0)
        repeats = self._repeats(rows) if self._per_head else 1
        if self.config.learn_tau == "head":
            tau = tau.repeat(repeats)
        where = None
        if draws(noise, scale):
            if self.seeds is not None:
                raise RuntimeError(
                    "seeds for each example are for layers that call their attention by name; this layer's own "
                    "softmax is rewritten and sees no examples. Leave it out of the patch, or switch its noise off."
                )
            where = Coordinates(draw_seed(device=scores.device), *scores.shape)
        how = (settings.get(name) for name in ("estimator", "samples", "top_k"))
        choice = make_choice(tau, settings["hard"], noise, scale, where, scores.dtype, *how)
        for observer in self.observers:
            observer(self._problem(scores, visible, choice))
        chosen = choose(scores, visible, choice)
        weights, log_prob = chosen.weights, chosen.log_prob
        if self.config.heads is not None:
            picked = {head % self.num_heads for head in self.config.heads}
            selected = torch.tensor([h in picked for h in range(self.num_heads)], device=scores.device).repeat(repeats)
            weights = torch.where(selected[:, None, None], weights, masked_softmax(scores, visible))
            log_prob = None if log_prob is None else log_prob.where(selected[:, None], 0.0)
        if self.collector is not None and log_prob is not None:
            self.hand_over(log_prob.reshape(self._repeats(rows), self.num_heads, -1))
        return weights

    def _problem(self, scores: Tensor, visible: Tensor, choice: Choice) -> AttentionProblem:
        """The attention that has these scores (1, N, Q, K), as a bias; by heads where N is a multiple of them."""
        n, q_len, k_len = scores.shape[1:]
        shape = (-1, self.num_heads if n % self.num_heads == 0 else 1, q_len, k_len)
        bias = scores.reshape(shape)
        tau, where = choice.tau, choice.where
        if isinstance(tau, Tensor) and tau.numel() > 1:
            tau = tau[:, : self.num_heads]
        if where is not None:
            where = Coordinates(where.seed, *bias.shape)
        return AttentionProblem(
            query=bias[..., :0],
            key=bias.new_empty((*bias.shape[:2], k_len, 0)),
            value=bias.new_empty((*bias.shape[:2], k_len, 0)),
            keep=visible.reshape(shape),
            bias=bias,
            is_causal=False,
            q_offset=0,
            k_offset=0,
            scale=1.0,
            softcap=None,
            sinks=None,
            dropout_p=0.0,
            seed_given=True,
            choice=dataclasses.replace(choice, tau=tau, where=where),
        )

    def _repeats(self, rows: Tensor) -> int:
        """How often the heads come one after the other in the flattened rows."""
        if rows.ndim == 4 and rows.shape[1] == self.num_heads:
            return rows.shape[0]
        if rows.ndim == 3 and rows.shape[0] % self.num_heads == 0:
            return rows.shape[0] // self.num_heads
        raise ValueError(
            "heads=, learn_tau='head' and collect_log_probs need scores of shape "
            f"(B, {self.num_heads}, Q, K) or (B*{self.num_heads}, Q, K) with the keys last, got {tuple(rows.shape)}; "
            "leave this layer out, or treat its heads alike."
        )


def _exchange_class(module: nn.Module, cls: Any) -> None:
    """Assigns ``__class__``, and binds again the methods that hooks such as Accelerate's keep on the instance."""
    before = type(module)
    module.__class__ = cls
    for name, value in list(vars(module).items()):
        if isinstance(value, types.MethodType) and value.__self__ is module:
            function = getattr(cls, value.__name__, None)
            if value.__func__ is getattr(before, value.__name__, None) and isinstance(function, types.FunctionType):
                vars(module)[name] = types.MethodType(function, module)


def _softmax_dtype(scores: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of torch.softmax(scores, dtype=dtype), which autocast may raise to float32."""
    if dtype is not None or not autocasts(scores.device):
        return dtype or scores.dtype
    return torch.softmax(scores.new_zeros(1), dim=0).dtype
