"""The score function estimator of a whole model: what its hard choices were worth, by their log-probability.

For a loss f of sampled choices y ~ p, and any baseline b that does not depend on y (Williams 1992, REINFORCE):

    d E[f(y)] = E[df(y)] + E[(f(y) - b) d log p(y)]

    with collect_log_probs(model) as chosen:
        losses = cross_entropy(model(**batch).logits, labels, reduction="none")
    loss = score_function_loss(losses, chosen.log_prob(), baseline)
    loss.backward()

An example's log p is the sum over the layers, heads and queries of its hard choices. Each loss is the sum of what it
would be alone, so that gradients may be accumulated over batches, and averaged over processes, as ever; with
DistributedDataParallel leave ``find_unused_parameters`` off, since it does not see the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import check_positive
from .state import AttentionState


class CollectedLogProbs:
    """The log-probabilities of the hard choices made while :func:`collect_log_probs` was in force.

    Of one forward pass: several of them in one context are added up.

    Attributes:
        layers: one (B, H, q_len) tensor for each call of an attention layer that chose, in the order of the calls.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self._differentiates = torch.is_grad_enabled()
        self._lost = False

    def add(self, log_prob: Tensor) -> None:
        """Takes those of one layer, (B, H, q_len); not those of a recomputation in the backward pass."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self._lost = self._lost or (self._differentiates and not torch.is_grad_enabled())
        self.layers.append(log_prob)

    def log_prob(self, query_mask: Tensor | None = None) -> Tensor:
        """The log-probability of each example's choices, (B,), differentiable.

        Args:
            query_mask: (B, q_len) bool: the queries that count, where padding chooses too. Its choices do not
                change the loss, so that leaving them out takes variance away and no more.

        Raises:
            RuntimeError: no layer made a hard choice under Gumbel noise, or gradients were off in a layer that did,
                as in reentrant checkpointing.
            ValueError: layers saw different numbers of examples, or the mask does not fit.
        """
        if not self.layers:
            raise RuntimeError(
                "no log-probabilities were collected: no attention layer of this model made a hard choice under "
                "Gumbel noise. It needs hard=True and noise='gumbel' in a patched or Gumbel layer, and train() mode "
                "or eval_noise=True."
            )
        if self._lost:
            raise RuntimeError(
                "log-probabilities were computed while gradients were off and carry none: use checkpointing with "
                "use_reentrant=False, and no torch.no_grad() inside the model."
            )
        sizes = {layer.shape[0] for layer in self.layers}
        if len(sizes) > 1:
            raise ValueError(f"the layers saw batches of different sizes, {sorted(sizes)}: examples cannot be told.")
        return torch.stack([_per_example(layer, query_mask) for layer in self.layers]).sum(dim=0)


def _per_example(log_prob: Tensor, query_mask: Tensor | None) -> Tensor:
    if query_mask is None:
        return log_prob.sum(dim=(1, 2))
    expected = (log_prob.shape[0], log_prob.shape[2])
    if tuple(query_mask.shape) != expected or query_mask.dtype != torch.bool:
        raise ValueError(
            f"query_mask must be bool of shape (batch, q_len) = {expected} of every layer that chose, got "
            f"{query_mask.dtype} {tuple(query_mask.shape)}."
        )
    return log_prob.sum(dim=1).masked_fill(~query_mask, 0.0).sum(dim=1)


@contextmanager
def collect_log_probs(model: nn.Module) -> Iterator[CollectedLogProbs]:
    """Within this context every attention layer of ``model`` hands over the log-probability of its hard choices.

    Args:
        model: with patched layers or modules of this library anywhere in it, wrapped or not.

    Raises:
        ValueError: it has none.
    """
    states = _states(model)
    before = [state.collector for state in states]
    collected = CollectedLogProbs()
    for state in states:
        state.collector = collected.add
    try:
        yield collected
    finally:
        for state, collector in zip(states, before, strict=True):
            state.collector = collector


@contextmanager
def soft_attention(model: nn.Module) -> Iterator[None]:
    """Within this context a choice is its expectation: softmax(scores / noise_scale), without noise.

    With ``top_k`` too, where it is the expectation of the first choice. The loss that a model has then is a baseline
    for the loss of its sampled choices (Deng et al. 2018), which needs no samples and no parameters of its own:
    ``with torch.no_grad(), soft_attention(model): ...``

    Raises:
        ValueError: ``model`` has no attention of this library.
    """
    states = _states(model)
    before = [state.expected for state in states]
    for state in states:
        state.expected = True
    try:
        yield
    finally:
        for state, expected in zip(states, before, strict=True):
            state.expected = expected


def score_function_loss(losses: Tensor, log_prob: Tensor, baseline: float | Tensor = 0.0) -> Tensor:
    """A scalar whose value is ``losses.mean()`` and whose gradient is the score function's estimate.

    ``mean(losses + stop_gradient(losses - baseline) * log_prob)``, with the value of the second term taken off.

    Args:
        losses: (B,) or (K, B), one for each example, as ``reduction="none"`` gives; lower is better.
        log_prob: of the choices each loss came from, in the same shape.
        baseline: a number or a tensor that broadcasts to the losses. It may depend on the example, not on the
            choices that this loss came from.

    Raises:
        ValueError: the losses are not per example, the shapes differ, or the log-probabilities have no gradient.
    """
    if losses.ndim == 0:
        raise ValueError("losses must be per example, (B,) or (K, B), got a scalar. Use reduction='none'.")
    if losses.shape != log_prob.shape:
        raise ValueError(
            f"losses and log_prob must have one shape, one entry for each example, got {tuple(losses.shape)} and "
            f"{tuple(log_prob.shape)}."
        )
    if torch.is_grad_enabled() and not log_prob.requires_grad:
        raise ValueError("log_prob carries no gradient: were the choices made under torch.no_grad()?")
    shape = tuple(baseline.shape) if isinstance(baseline, Tensor) else ()
    sizes = zip(reversed(shape), reversed(losses.shape), strict=False)
    if len(shape) > losses.ndim or any(size not in (1, full) for size, full in sizes):
        raise ValueError(f"baseline must broadcast to the losses' shape {tuple(losses.shape)}, got {shape}.")
    advantage = (losses - baseline).detach()
    return (losses + advantage * (log_prob - log_prob.detach())).mean()


def leave_one_out(losses: Tensor) -> Tensor:
    """The baseline of each of K samples: the mean loss of the other K - 1 (Salimans & Knowles 2014, Kool et al. 2019).

    Args:
        losses: (K, ...), the samples along the first dimension.

    Returns:
        The shape of ``losses``, without gradient.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if losses.ndim == 0 or losses.shape[0] < 2:
        raise ValueError(f"leave_one_out needs losses (K, ...) of K >= 2 samples, got {tuple(losses.shape)}.")
    losses = losses.detach()
    return (losses.sum(dim=0) - losses) / (losses.shape[0] - 1)


class MovingAverageBaseline(nn.Module):
    """The mean loss of the batches before, which weigh less the longer ago they were.

    ``value = (1 - d) sum_i d^i m_i / (1 - d^n)`` over the mean losses m_0 (the last) ... m_(n-1): like Adam's moments,
    unbiased from the first on. Use it before :meth:`update`, or the baseline depends on the choices. A module, so
    that checkpoints keep it; each process keeps its own.

    Args:
        decay: d, above 0 and below 1.

    Raises:
        ValueError: ``decay`` is outside.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        check_positive("decay", decay)
        if decay >= 1.0:
            raise ValueError(f"decay must be above 0 and below 1, got {decay!r}.")
        self.decay = decay
        self.total: Tensor
        self.weight: Tensor
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def value(self) -> Tensor:
        """The baseline, (); 0 before the first update."""
        return torch.where(self.weight > 0, self.total / self.weight.clamp(min=1e-30), 0.0)

    def update(self, losses: Tensor) -> None:
        """Takes the losses of a batch in, of any shape."""
        with torch.no_grad():
            self.total.lerp_(losses.detach().mean().to(self.total), 1.0 - self.decay)
            self.weight.lerp_(torch.ones_like(self.weight), 1.0 - self.decay)


def _states(model: nn.Module) -> list[AttentionState]:
    states = [module for module in model.modules() if isinstance(module, AttentionState)]
    if not states:
        raise ValueError(
            f"{type(model).__name__} has no attention of this library: patch it with patch_model(model, config) first."
        )
    return states
