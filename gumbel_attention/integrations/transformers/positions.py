"""Where the queries and keys of a call stand in their sequences: what is drawn by seeds belongs to these positions.

A module is given its cache, its call of attention is not. So a hook of the module notes the cache, and how many tokens
it held before the module added its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ...arguments import takes_part
from ..patched_state import state_of

_PADDING = "_gumbel_attention_padding"
"""Attribute of a cache: the padding on the left, by layer, as the sequences' first call shows it. A later one shows
less where a window has left the first keys behind."""


class Call(NamedTuple):
    """What a module was called with.

    Attributes:
        cache: its cache.
        layer: its layer of the cache.
        seen: how many tokens that layer held.
        own: whether the keys are the module's own tokens, not another sequence's.
    """

    cache: Cache | None
    layer: int
    seen: int
    own: bool


def follow_calls(module: nn.Module) -> None:
    """Has the module's state be told of each :class:`Call` while it has seeds."""
    module.register_forward_pre_hook(_note_call, with_kwargs=True)


def unfollow_calls(module: nn.Module) -> None:
    """Undoes :func:`follow_calls`."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _note_call]:
        del module._forward_pre_hooks[key]
        del module._forward_pre_hooks_with_kwargs[key]


def _note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state: Any = state_of(module)
    if state is None or state.seeds is None:
        return
    given = (*args, *kwargs.values())
    cache = next((x for x in given if isinstance(x, Cache)), None)
    sequences = sum(isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point() for x in given)
    layer = getattr(module, "layer_idx", None) or 0
    state.call = Call(cache, layer, 0 if cache is None else _count(cache, layer), sequences < 2)


def _count(cache: Cache, layer: int = 0) -> int:
    """How many tokens a layer of the cache has seen; 0 where it keeps none, as its keys are another layer's."""
    try:
        return int(cache.get_seq_length(layer))
    except ValueError:
        return 0


def offsets(
    module: nn.Module, call: Call | None, query: Tensor, key: Tensor, mask: Tensor | None, sink_key: bool
) -> tuple[int | Tensor, int | Tensor]:
    """The positions of the first query and the first key: ints, or int64 (B,) where examples are padded on the left.

    A position counts the tokens of its sequence from the first that is not padding.

    Args:
        module: the attention module.
        call: what it was called with; ``None`` where that is not known.
        query: (B, H, Lq, D).
        key: (B, Hk, Lk, D), with those of the cache.
        mask: bool or additive, or ``None``.
        sink_key: a sink takes part as a key after the last.

    Raises:
        NotImplementedError: a cache is in use, and the call does not show the positions.
    """
    (batch, _, q_len, _), k_len = query.shape, key.shape[-2]
    if call is None:
        if q_len < k_len:
            raise _unknown(module, f"{q_len} queries and {k_len} keys, of which some may come from a cache")
        call = Call(None, 0, 0, own=q_len == k_len)
    if not call.own:
        return _first_of_cross(module, call, q_len), -_left_padding(mask, batch, 0)
    if call.cache is None:
        padding = _left_padding(mask, batch, 0)
        return -padding, -padding
    grown = _count(call.cache, call.layer) - call.seen == q_len
    q_first = call.seen if grown else _count(call.cache) - q_len  # with another layer's keys: the first layer counts
    k_first = max(q_first + q_len - k_len, 0)  # a window leaves the latest keys; a static cache has room behind them
    strange = k_len > q_first + q_len and not call.cache.is_compileable
    strange |= k_first > 0 and not grown and getattr(module, "sliding_window", None) is None
    if q_first < 0 or (q_first > 0 and (strange or sink_key)):
        raise _unknown(module, f"{q_len} queries and {k_len} keys{' and a sink' * sink_key} after {q_first} tokens")
    padding = _padding_of_cache(module, call._replace(seen=q_first), mask, batch, q_len, k_first)
    return q_first - padding, k_first - padding


def _first_of_cross(module: nn.Module, call: Call, q_len: int) -> int:
    """The position of the first query that attends to another sequence, after the attention to its own."""
    if call.cache is None:
        return 0
    encoder_decoder = isinstance(call.cache, EncoderDecoderCache)
    first = _count(call.cache, call.layer if encoder_decoder else 0) - q_len
    if first < 0 or (first > 0 and not encoder_decoder):
        raise _unknown(module, f"{q_len} queries to another sequence and a {type(call.cache).__name__}")
    return first


def _left_padding(mask: Tensor | None, batch: int, blind: int) -> int | Tensor:
    """How many keys on the left no query sees, int64 (B,); 0 where every example has a query that sees the first.

    Args:
        mask: broadcasts to (B, H, Lq, Lk).
        batch: B.
        blind: the number for an example that sees no key.
    """
    if mask is None:
        return 0
    seen = takes_part(mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)).any(-2).any(1)
    first = seen.int().argmax(-1).where(seen.any(-1), blind)
    return first.expand(batch) if bool(first.any()) else 0


def _padding_of_cache(
    module: nn.Module, call: Call, mask: Tensor | None, batch: int, q_len: int, k_first: int
) -> int | Tensor:
    """The padding on the left of the sequences in a cache, as their first call under seeds showed it."""
    known: dict[int, int | Tensor] = vars(call.cache).setdefault(_PADDING, {})
    if call.seen == 0:
        known[call.layer] = _left_padding(mask, batch, q_len)
    elif call.layer not in known:
        if k_first > 0 or not isinstance(_left_padding(mask, batch, 0), int):
            raise _unknown(module, "a cache that was filled without seeds, perhaps with padding on the left")
        known[call.layer] = 0
    padding = known[call.layer]
    if isinstance(padding, int):
        return padding
    if padding.shape[0] != batch:
        raise _unknown(module, f"{batch} examples and a cache that was filled with {padding.shape[0]}")
    if call.seen > 0:  # an example that was nothing but padding so far may begin now
        begins = k_first + _left_padding(mask, batch, call.seen + q_len - k_first)
        known[call.layer] = padding = padding.where(padding < call.seen, begins)
    return padding


def _unknown(module: nn.Module, came: str) -> NotImplementedError:
    return NotImplementedError(
        f"what is drawn by seeds belongs to positions, and {type(module).__name__} does not show those of this call: "
        f"it came with {came}. Fill the cache under seeds, too; or call the model on whole sequences with "
        "use_cache=False, or leave the layer out of the patch."
    )
