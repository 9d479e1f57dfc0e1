r"""How attention chooses while a model trains: entropy, noise that changes the choice, gradients that are gone.

    with ga.collect_diagnostics(model, rows=16) as diagnostics:
        loss = model(**batch).loss
    logged = {f"gumbel/{name}": value.item() for name, value in diagnostics.summary().items()}

Each call of an attention layer is measured at up to ``rows`` of its queries, all heads of each. Their scores S and
their noise G are computed again, by the reference's formula: G is a pure function of seed and position, so it is the
noise that the layer uses, whichever implementation runs. No generator is asked for more than without measuring, and
output and gradients stay what they are, to the bit. With c = noise_scale, n the number of keys that a query sees,

    p = softmax(S / tau)                the choice without its noise
    w = softmax((S + c G) / tau)        the relaxed choice with it; p where there is no noise

both in float32 (float64 for float64 inputs), and each measure is a mean over queries and heads of

    ======================  ===========================================================================================
    entropy                 -sum p log p, in nats
    normalized_entropy      that divided by log n: 1 is uniform, 0 one key
    relaxed_entropy         -sum w log w, in nats: how soft the relaxation is
    max_weight              max w
    argmax_flip_rate        1 where argmax w is not argmax p: the noise changed the choice
    saturated_share         1 where max w is 1: it rounds to 1, what the other keys weigh is below about 6e-8 in all
    zero_gradient_share     1 where every entry of w but one is 0: the gradient of the scores, w (g - sum w g) / tau,
                            is 0 in every entry for every finite gradient g of the weights. Where the others are tiny,
                            but not 0, some g gives a gradient that is not
    ======================  ===========================================================================================

A sink counts as a key. With ``top_k`` p and w are the relaxed subset, and the noise changed the choice where the sets
of keys differ. ``zero_gradient_share`` is there for soft choices of one key and straight-through: other estimators
send other gradients. Dropout is left out. Under :func:`soft_attention` the choice measured is the expectation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import without_autocast
from .choice import Row, pick, relaxed, row_of
from .impl.problem import AttentionProblem, compute_dtype
from .modules import GumbelSetAttention
from .noise import Coordinates, positions
from .selection import PatchedLayer
from .state import AttentionState

MEASURES = (
    "entropy",
    "normalized_entropy",
    "relaxed_entropy",
    "max_weight",
    "argmax_flip_rate",
    "saturated_share",
    "zero_gradient_share",
)
"""The measures, in the order in which they are given."""

GATHERED = 2**24
"""Entries of keys that are copied at a time to compute the scores of the queries sampled."""

_GOLDEN = 0.6180339887498949
_IN_LAYER = re.compile(r"\.?gumbel(\.original_module|\.modules_to_save\..*)?$")


class CollectedDiagnostics:
    """What was measured while :func:`collect_diagnostics` was in force; several passes in one context are pooled.

    Args:
        layers: the names of the layers that are watched.
        rows: queries of a call that are measured at most.
    """

    def __init__(self, layers: list[str], rows: int) -> None:
        self.layers = list(dict.fromkeys(layers))
        self.rows = rows
        self._totals: dict[str, dict[str, Tensor]] = {}

    def add(self, layer: str, heads: Tensor | None, one_sequence: bool, problem: AttentionProblem) -> None:
        """Measures a call, unless it is a recomputation in the backward pass.

        Args:
            layer: its name.
            heads: bool (H,): which heads count; ``None`` for all.
            one_sequence: queries and keys may be positions of one sequence, and padding be left out.
            problem: the call, with the seed that it uses.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if 0 in (*problem.query.shape[:3], problem.key.shape[-2]):
            return
        with torch.no_grad(), without_autocast(problem.query.device):
            measured = _measure(problem, self.rows, heads, one_sequence)
        before = self._totals.get(layer, {})
        added = {name: before[name] + total if name in before else total for name, total in measured.items()}
        self._totals[layer] = before | added

    def per_layer(self) -> dict[str, dict[str, Tensor]]:
        """The measures by layer and name: tensors of shape () on the layer's device, without synchronisation.

        A layer of which no call came by is not in it (see :attr:`unmeasured`). NaN where no query counted.
        """
        return {
            layer: {name: totals[name][0] / totals[name][1] for name in MEASURES if name in totals}
            for layer, totals in self._totals.items()
        }

    def summary(self) -> dict[str, Tensor]:
        """The mean of each measure over the layers, each layer counting alike; without those where no query counted.

        Raises:
            RuntimeError: no attention layer ran.
        """
        layers = list(self.per_layer().values())
        if not layers:
            raise RuntimeError(
                "nothing was measured: no attention layer of this library ran in this context. The forward pass "
                "belongs inside `with collect_diagnostics(model) as diagnostics:`, and the model must be the one that "
                "runs."
            )
        found = {name: [layer[name] for layer in layers if name in layer] for name in MEASURES}
        return {
            name: torch.stack([x.to(values[0]) for x in values]).nanmean() for name, values in found.items() if values
        }

    def counted(self) -> dict[str, Tensor]:
        """How many rows of weights, one for each query and head, count in the means of each layer: shape ()."""
        return {layer: totals["entropy"][1] for layer, totals in self._totals.items()}

    @property
    def unmeasured(self) -> list[str]:
        """The layers that are watched and did not run."""
        return [layer for layer in self.layers if layer not in self._totals]


@contextmanager
def collect_diagnostics(model: nn.Module, rows: int = 16) -> Iterator[CollectedDiagnostics]:
    """Within this context every attention layer of ``model`` is measured at a few of its queries.

    Which queries depends on the shapes and masks alone: they lie spread over batch and positions, among those that
    see two keys or more. Where queries and keys are equally many, a query whose own key no query sees is padding and
    left out too; not so in cross-attention, as told by the layer's name, and in :class:`GumbelSetAttention`. Heads
    that the settings leave out are not measured. Contexts may be nested, in any order: each collects by itself. A
    layer that a checkpoint computes again in the backward pass counts once. Costs, for each call, the scores of
    ``rows`` queries and a few dozen small operations; a compiled model is compiled once more for the context.

    Args:
        model: with patched layers or modules of this library anywhere in it, wrapped or not.
        rows: how many queries of each call, over the whole batch, at most.

    Yields:
        :class:`CollectedDiagnostics`, to be read at any time; layers go by the names that ``model.named_modules()``
        gives their attention modules.

    Raises:
        TypeError: ``model`` is no module, or ``rows`` no int.
        ValueError: ``model`` has no attention of this library, or ``rows`` is below 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the model, not its patch.")
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"rows must be an int >= 1, got {rows!r} of type {type(rows).__name__}.")
    if rows < 1:
        raise ValueError(f"rows must be an int >= 1, got {rows}.")
    states = {name: module for name, module in model.named_modules() if isinstance(module, AttentionState)}
    if not states:
        raise ValueError(
            f"{type(model).__name__} has no attention of this library: patch it with patch_model(model, config) first."
        )
    names = {name: _IN_LAYER.sub("", name) for name in states}
    collected = CollectedDiagnostics(list(names.values()), rows)
    with ExitStack() as stack:
        for name, state in states.items():
            one_sequence = _may_be_one_sequence(model.get_submodule(names[name]), names[name])
            observer = partial(collected.add, names[name], _selected(state), one_sequence)
            stack.enter_context(state.observed(observer))
        yield collected


def _may_be_one_sequence(module: nn.Module, name: str) -> bool:
    return not isinstance(module, GumbelSetAttention) and not PatchedLayer(name, "", "").is_cross


def _selected(state: AttentionState) -> Tensor | None:
    """Which heads the settings select: bool (H,); ``None`` for all."""
    if state.config.heads is None:
        return None
    chosen = {head % state.num_heads for head in state.config.heads}
    return torch.tensor([head in chosen for head in range(state.num_heads)], device=state.tau.device)


@dataclasses.dataclass(frozen=True)
class _SampledCoordinates(Coordinates):
    """Coordinates of single queries: entry i of the batch is that at ``q_offset[i]`` in example ``examples[i]``."""

    examples: Tensor | None = None

    def _seed_and_head(self) -> tuple[Tensor, Tensor]:
        assert self.examples is not None
        h = torch.arange(self.heads, device=self.seed.device) + self.h_offset
        if self.seed.ndim == 1:
            return self.seed[:, None], h[None, :]
        return self.seed, self.examples[:, None] * (self.h_total or self.heads) + h


class _Sample(NamedTuple):
    """Queries of a call: example and position of each, (R,), and which of them count."""

    example: Tensor
    query: Tensor
    counted: Tensor


def _measure(problem: AttentionProblem, rows: int, heads: Tensor | None, one_sequence: bool) -> dict[str, Tensor]:
    """Sum and count, (2,), of each measure over the rows of weights of a sample of queries."""
    sample = _spread(_eligible(problem, one_sequence), rows)
    scores, row = _scores(problem, sample)
    keys = torch.ones_like(scores).sum(-1) if row.visible is None else row.visible.expand_as(scores).sum(-1)
    counted = sample.counted[:, None, None] & (keys >= 2)
    if heads is not None and len(heads) == counted.shape[1]:  # else the layer itself raises
        counted = counted & heads.to(counted.device)[:, None]
    count = counted.sum(dtype=scores.dtype)
    return {
        name: torch.stack([value.to(scores.dtype).where(counted, 0.0).sum(), count])
        for name, value in _values(scores, row, keys).items()
    }


def _values(scores: Tensor, row: Row, keys: Tensor) -> dict[str, Tensor]:
    """The measures of each row of scores (R, H, 1, n) with ``keys`` visible ones: (R, H, 1) each."""
    choice, quiet = row.choice, dataclasses.replace(row, noise=None)
    p = relaxed(scores, choice.tau, choice.noise_scale, quiet)
    w = p if row.noise is None else relaxed(scores, choice.tau, choice.noise_scale, row)
    entropy, top = _entropy(p), w.amax(dim=-1)
    flips = pick(scores, row).sort(dim=-1).values != pick(scores, quiet).sort(dim=-1).values
    values = {
        "entropy": entropy,
        "normalized_entropy": entropy / keys.clamp(min=2).to(scores.dtype).log(),
        "relaxed_entropy": _entropy(w),
        "max_weight": top,
        "argmax_flip_rate": flips.any(dim=-1),
        "saturated_share": top == 1.0,
    }
    if choice.only_straight_through:
        values["zero_gradient_share"] = (w != 0.0).sum(dim=-1) == 1
    return values


def _entropy(p: Tensor) -> Tensor:
    entries: Tensor = torch.special.entr(p)
    return entries.sum(dim=-1)


def _scores(problem: AttentionProblem, sample: _Sample) -> tuple[Tensor, Row]:
    """Scores (R, H, 1, Lk) of the queries sampled, with the sink's column if there is one, and the rest of the row."""
    dtype = compute_dtype(problem.query.dtype)
    batch, heads, q_len, k_len = *problem.query.shape[:3], problem.key.shape[-2]
    example, query = sample.example, sample.query

    def of_sample(x: Tensor) -> Tensor:
        return x.expand(batch, heads, q_len, k_len)[example, :, query][:, :, None]

    def of_example(x: int | Tensor) -> int | Tensor:
        return x[example] if isinstance(x, Tensor) else x

    q_offset, k_offset = of_example(problem.q_offset) + query, of_example(problem.k_offset)
    scores = _products(problem, sample, dtype) * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    visible = None if problem.keep is None else of_sample(problem.keep)
    if problem.bias is not None:
        scores = scores + of_sample(problem.bias).to(dtype)
    if problem.is_causal:
        causal = q_offset[:, None] >= positions(k_offset, k_len, query.device)
        visible = causal[:, None, None] if visible is None else visible & causal[:, None, None]
    sinks = problem.sinks
    if sinks is not None:
        sinks = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    choice, where = problem.choice, problem.choice.where
    if choice.noise != "none":
        assert where is not None
        seed = where.seed if where.seed.ndim == 0 else where.seed[example]
        block = (len(example), heads, 1, k_len)
        where = _SampledCoordinates(seed, *block, q_offset, k_offset, where.h_offset, where.h_total, example)
    return row_of(scores, visible, choice, where, sinks)


def _products(problem: AttentionProblem, sample: _Sample, dtype: torch.dtype) -> Tensor:
    """Queries sampled times the keys of their examples, (R, H, 1, Lk); few keys are copied at a time."""
    key, parts = problem.key, []
    at_a_time = max(1, GATHERED // max(1, key[0].numel()))
    for example, query in zip(sample.example.split(at_a_time), sample.query.split(at_a_time), strict=True):
        q = problem.query[example, :, query].to(dtype).unflatten(1, (key.shape[1], -1))  # (r, Hk, group, D)
        parts.append((q @ key[example].to(dtype).mT).flatten(1, 2)[:, :, None])
    return torch.cat(parts)


def _eligible(problem: AttentionProblem, one_sequence: bool) -> Tensor:
    """Which queries count, bool (B, Lq): in some head they see two keys or more, and they are no padding."""
    batch, _, q_len, _ = problem.query.shape
    seen = _keys_seen(problem) + (0 if problem.sinks is None else 1)
    eligible = (seen >= 2).any(dim=1).expand(batch, q_len)
    if one_sequence and q_len == problem.key.shape[-2] and problem.keep is not None:
        seen_keys = problem.seen_keys()
        assert seen_keys is not None
        eligible = eligible & seen_keys.any(dim=1)
    return eligible


def _keys_seen(problem: AttentionProblem) -> Tensor:
    """How many keys each query sees: int64, broadcasts against (B, H, Lq)."""
    q_len, k_len, device = problem.query.shape[-2], problem.key.shape[-2], problem.query.device
    keep = problem.keep
    if keep is not None and keep.shape[-2] > 1:
        visible = problem.visible()
        assert visible is not None
        return visible.expand(*visible.shape[:-1], k_len).sum(dim=-1)
    if keep is None:
        keep = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    keep = keep[..., 0, :].expand(*keep.shape[:2], k_len)
    if not problem.is_causal:
        return keep.sum(dim=-1, keepdim=True).expand(*keep.shape[:2], q_len)
    first = positions(problem.q_offset, q_len, device) - positions(problem.k_offset, 1, device)
    before = torch.nn.functional.pad(keep.cumsum(dim=-1), (1, 0))  # how many of the first 0, 1, ... k_len keys
    reach = (first + 1).clamp(min=0, max=k_len)[:, None]
    lead = torch.broadcast_shapes(before.shape[:2], reach.shape[:2])
    return before.expand(*lead, -1).gather(-1, reach.expand(*lead, -1))


def _spread(eligible: Tensor, rows: int) -> _Sample:
    """Up to ``rows`` of the eligible queries (B, Lq): all where they are no more, else one of each of equal shares.

    Where in its share moves on by the golden ratio, lest all lie at the same position of their examples.
    """
    before = eligible.flatten().cumsum(dim=0)
    there = before[-1]
    count = min(rows, eligible.numel())
    place = torch.arange(count, device=eligible.device)
    start, end = place * there // count, (place + 1) * there // count
    within = ((place + 1) * _GOLDEN % 1.0 * (end - start)).long()
    number = torch.where(there > count, torch.minimum(start + within, end - 1), place)
    flat = torch.searchsorted(before, number + 1).clamp(max=eligible.numel() - 1)
    q_len = eligible.shape[1]
    return _Sample(flat // q_len, flat % q_len, place < there)
