"""Attention layers: torch.nn.MultiheadAttention with another choice, and attention to the elements of a set."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .attend import attend
from .config import GumbelAttentionConfig
from .functional import AttentionInfo
from .state import AttentionState


class _Adjustable:
    """Setters for the state a layer keeps as ``gumbel``."""

    gumbel: AttentionState

    def set_tau(self, tau: float) -> None:
        """Sets the scheduled temperature; see :meth:`AttentionState.set_tau`."""
        self.gumbel.set_tau(tau)

    def noise(self, on: bool | str | None) -> None:
        """Switches the noise on or off, or to a family by name, in both modes; ``None`` leaves it to the mode."""
        self.gumbel.check_override(on)
        self.gumbel.noise_override = on

    def hard(self, on: bool | None) -> None:
        """Makes the choice hard or soft in both modes; ``None`` leaves it to the mode."""
        self.gumbel.check_hard(on)
        self.gumbel.hard_override = on


class GumbelMultiheadAttention(_Adjustable, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` whose heads choose as a :class:`GumbelAttentionConfig` says.

    Each head computes ``gumbel_attention(x_q W_q, x_k W_k, x_v W_v)``; their outputs, side by side, go through
    ``out_proj``. Constructor, parameters, initialisation, state_dict and conventions (bool masks: True is masked
    out) are torch's, and so are the results with ``noise="none"`` and ``tau=1.0``. A learned temperature adds
    the key ``gumbel.log_tau``, which a state_dict of torch's module does not have. Unlike torch's:

    - a query whose keys are all masked attends to nothing: 0 before ``out_proj``, where torch's gives NaN; keys and
      values under ``key_padding_mask`` are not read, whatever they hold;
    - weights are those used, after dropout: exactly one-hot for a hard choice without dropout;
    - ``is_causal`` is a hint that needs ``attn_mask``, and the mask is what counts;
    - bool and floating point masks mix without a warning, and what does not fit is a TypeError or ValueError;
    - torch's fused inference kernels, which know only the softmax, never replace it:
      :class:`torch.nn.TransformerEncoderLayer` takes its ordinary path around this module, also in ``eval()``.

    Args:
        embed_dim: width of the queries and the output.
        num_heads: divides ``embed_dim``.
        dropout: of the attention weights, in training.
        bias: projections have biases.
        add_bias_kv: learned key and value after the others.
        add_zero_attn: zero key and value after those.
        kdim: width of the keys; ``None`` is ``embed_dim``.
        vdim: width of the values; ``None`` is ``embed_dim``.
        batch_first: inputs are (N, L, E) rather than (L, N, E).
        device: of the parameters.
        dtype: of the parameters; the temperature is float32 always.
        config: the settings; ``None`` is ``GumbelAttentionConfig()``. Heads it leaves out keep their softmax.

    Raises:
        TypeError: ``config`` is of another type.
        ValueError: ``num_heads`` does not divide ``embed_dim``, or the config selects what is not here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: GumbelAttentionConfig | None = None,
    ) -> None:
        config = _settings_of_one_layer(config)
        checks.check_heads(embed_dim, num_heads)
        own = (embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first)
        super().__init__(*own, device=device, dtype=dtype)
        self.gumbel = AttentionState(config, num_heads, device)
        # TransformerEncoderLayer calls its fused softmax kernel instead of this module unless a submodule has a hook.
        self.register_forward_pre_hook(_no_hook)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            query: (L, N, embed_dim), or (N, L, embed_dim) with ``batch_first``, or (L, embed_dim) without a batch; or
                the nested tensor that :class:`torch.nn.TransformerEncoder` makes of a padded batch.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,); bool (True is masked out) or floating point (added to the scores; entries
                <= finfo.min / 2, such as -inf, are masked out).
            need_weights: return the weights.
            attn_mask: (L, S) or (N * num_heads, L, S), in the same two kinds.
            average_attn_weights: return their mean over the heads.
            is_causal: says that ``attn_mask`` is causal; changes nothing.

        Returns:
            The output, of the query's shape, and the weights: (N, L, S), or (N, num_heads, L, S) where they are not
            averaged, without N for unbatched inputs, or ``None``. ``add_bias_kv`` and ``add_zero_attn`` add one to S.

        Raises:
            TypeError, ValueError: an argument does not fit; the message says what was expected.
        """
        if query.is_nested:
            alone = query is key is value and key_padding_mask is None and attn_mask is None
            if not alone or need_weights or not self.batch_first:
                raise ValueError(
                    "a nested tensor must be query, key and value at once, with batch_first=True, "
                    "need_weights=False and no masks; pad it otherwise."
                )
            return self._attend_nested(query), None
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask and needs one, got attn_mask=None.")
        batched = query.ndim == 3
        checks.check_dims(query=query, key=key, value=value)
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        n, s = query.shape[0], key.shape[1]
        checks.check_shape("query", query, (n, None, self.embed_dim), "(batch, length, embed_dim)")
        checks.check_shape("key", key, (n, None, self.kdim), "(batch, length, kdim)")
        checks.check_shape("value", value, (n, s, self.vdim), "(batch, length of key, vdim)")

        info = self._attend_batch(query, key, value, key_padding_mask, attn_mask, need_weights)
        output, weights = self.out_proj(_merge_heads(info.output)), info.weights
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """Refuses: only torch's fused kernels ask for merged masks, and those would compute a plain softmax.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "torch's fused attention kernel would bypass GumbelMultiheadAttention. Its forward pre-hook, which "
            "prevents that, was removed; torch.backends.mha.set_fastpath_enabled(False) prevents it too."
        )

    def _attend_batch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> AttentionInfo:
        """Projections and attention on (N, L, E) inputs; the output is not yet merged over the heads."""
        n, q_len, k_len, heads = query.shape[0], query.shape[1], key.shape[1], self.num_heads
        masks = []
        if padding is not None:
            checks.check_torch_mask("key_padding_mask", padding, (n, k_len))
            hidden = _masked_out(padding)[..., None]
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
            masks.append(padding[:, None, None, :])
        if attn_mask is not None:
            checks.check_torch_mask("attn_mask", attn_mask, (q_len, k_len), (n * heads, q_len, k_len))
            masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (n, heads)))

        q, k, v = self._project(query, key, value)
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.to(k.dtype), self.bias_v.to(v.dtype)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, self.embed_dim), v.new_zeros(1, 1, self.embed_dim)))
        for more_k, more_v in extra:
            k, v = torch.cat([k, more_k.expand(n, 1, -1)], 1), torch.cat([v, more_v.expand(n, 1, -1)], 1)
        mask = _merge_masks(masks)
        if mask is not None:
            mask = F.pad(mask, (0, len(extra)), value=float(mask.dtype == torch.bool))
        q, k, v = (_split_heads(x, heads) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        return attend(self.gumbel, self.training, q, k, v, mask, dropout, need_weights=need_weights)

    def _attend_nested(self, x: Tensor) -> Tensor:
        lengths = [len(example) for example in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device)[:, None]
        output = self.out_proj(_merge_heads(self._attend_batch(padded, padded, padded, padding, None, False).output))
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(output, lengths, strict=True)])

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


class SetAttentionOutput(NamedTuple):
    """What :class:`GumbelSetAttention` found.

    Attributes:
        output: (B, Q, embed_dim).
        weights: (B, H, Q, N), those used, after dropout.
        indices: (B, H, Q) int64, the element each head of each query chose, or with ``top_k`` (B, H, Q, top_k) the
            elements, the best first; -1 where there was none, or where the head keeps its softmax. ``None`` for a
            soft choice.
        log_prob: (B, H, Q), as in :class:`AttentionInfo`, or ``None``.
    """

    output: Tensor
    weights: Tensor
    indices: Tensor | None
    log_prob: Tensor | None


class GumbelSetAttention(_Adjustable, nn.Module):
    """Learned queries that attend to the elements of a set, and say which they chose.

    ``output = out_proj(concat_h gumbel_attention(query W_q, elements W_k, values W_v))``: pooling by multi-head
    attention (Lee et al. 2019, Set Transformer) without its feed-forward and residual parts. The order of the
    elements does not count, except that the noise belongs to positions. Parameters start as those
    of a :class:`torch.nn.MultiheadAttention` with ``kdim``, the learned queries by Xavier's uniform rule.

    Args:
        embed_dim: width of queries and output.
        num_heads: divides ``embed_dim``.
        num_queries: how many queries are learned.
        kdim: width of the elements; ``None`` is ``embed_dim``.
        vdim: width of the values; ``None`` is ``kdim``, as values default to the elements.
        bias: projections have biases.
        dropout: of the attention weights, in training.
        config: the settings; ``None`` is ``GumbelAttentionConfig()``.
        device: of the parameters.
        dtype: of the parameters; the temperature is float32 always.

    Raises:
        TypeError: ``config`` is of another type.
        ValueError: a size is below 1, ``num_heads`` does not divide ``embed_dim``, ``dropout`` is no probability, or
            the config selects what is not here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        num_queries: int = 1,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        config: GumbelAttentionConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = _settings_of_one_layer(config)
        checks.check_heads(embed_dim, num_heads)
        if num_queries < 1 or not 0.0 <= dropout <= 1.0:
            raise ValueError(f"num_queries must be >= 1 and dropout between 0 and 1, got {num_queries} and {dropout}.")
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = self.kdim if vdim is None else vdim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = nn.Parameter(torch.empty(num_queries, embed_dim, **factory))
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias, **factory)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.gumbel = AttentionState(config, num_heads, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters anew; a learned temperature keeps its value."""
        nn.init.xavier_uniform_(self.queries)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        elements: Tensor,
        query: Tensor | None = None,
        mask: Tensor | None = None,
        values: Tensor | None = None,
    ) -> SetAttentionOutput:
        """Attends to a batch of sets.

        Args:
            elements: (B, N, kdim).
            query: (B, Q, embed_dim), in place of the learned queries.
            mask: (B, N) bool, True takes part. The others are not read. A set without elements that take part gives
                ``out_proj`` of zeros.
            values: (B, N, vdim); ``None`` is the elements.

        Returns:
            :class:`SetAttentionOutput`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message says what was expected.
        """
        values = elements if values is None else values
        checks.check_shape("elements", elements, (None, None, self.kdim), "(batch, elements, kdim)")
        b, n, _ = elements.shape
        checks.check_shape("values", values, (b, n, self.vdim), "(batch, elements, vdim)")
        if query is None:
            query = self.queries.expand(b, -1, -1)
        checks.check_shape("query", query, (b, None, self.embed_dim), "(batch, queries, embed_dim)")
        if mask is not None:
            checks.check_shape("mask", mask, (b, n), "(batch, elements)")
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool (True takes part), got {mask.dtype}.")
            elements = elements.masked_fill(~mask[..., None], 0.0)
            values = values.masked_fill(~mask[..., None], 0.0)
            mask = mask[:, None, None, :]

        projected = (self.q_proj(query), self.k_proj(elements), self.v_proj(values))
        q, k, v = (_split_heads(x, self.num_heads) for x in projected)
        info = attend(self.gumbel, self.training, q, k, v, mask, self.dropout if self.training else 0.0)
        output = self.out_proj(_merge_heads(info.output))
        assert info.weights is not None
        return SetAttentionOutput(output, info.weights, info.indices, info.log_prob)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_queries={len(self.queries)}"


def _no_hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing; that it is there keeps fused kernels away."""


def _settings_of_one_layer(config: GumbelAttentionConfig | None) -> GumbelAttentionConfig:
    config = GumbelAttentionConfig() if config is None else config
    if not isinstance(config, GumbelAttentionConfig):
        raise TypeError(f"config must be a GumbelAttentionConfig or None, got {type(config).__name__}.")
    if config.layers is not None:
        raise ValueError(
            f"layers selects among the attention layers of a model and means nothing to a single one; "
            f"expected layers=None, got {list(config.layers)}."
        )
    return config


def _masked_out(mask: Tensor) -> Tensor:
    """Which entries of a mask of torch's MultiheadAttention hide a key."""
    return mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


def _merge_masks(masks: list[Tensor]) -> Tensor | None:
    """Masks of torch's MultiheadAttention as one of ours: bool (True takes part) if all are bool, else additive."""
    if not masks:
        return None
    keep = ~_masked_out(masks[0])
    for mask in masks[1:]:
        keep = keep & ~_masked_out(mask)
    biases = [mask for mask in masks if mask.dtype != torch.bool]
    if not biases:
        return keep
    return torch.where(keep, sum(biases[1:], biases[0]), -torch.inf)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, E) as (N, H, L, E / H)."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """(N, H, L, D) as (N, L, H * D)."""
    return x.transpose(1, 2).flatten(-2)
