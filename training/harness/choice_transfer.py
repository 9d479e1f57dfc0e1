r"""Scores that learn which one key to read in the average's place, and values worth reading alone.

A head with weights :math:`a = \mathrm{softmax}(S)` gives :math:`u = \sum_j a_j v_j`. Made hard, it reads the value of
the key with the largest weight, which is often far from u. Two things bring it closer. The scores learn to choose the
key whose value is nearest, and the values learn to be what is read,

.. math:: j^* = \mathrm{argmin}_j \|v_j - u\|^2 , \qquad
   \mathrm{loss} = -\log \mathrm{softmax}(S)_{j^*} + \|v_{\mathrm{argmax} S} - u\|^2 / \|u\|^2 ,

the first the mean over queries and heads, the second of their sums, and the mean over layers. u comes from a copy of
the model that stays as it was, and every layer reads the inputs that it has there: what one layer learns does not
disturb another, and only what makes queries, keys and values gets a gradient. No labels are used. It is vector
quantisation with the keys' values for a codebook: j* is its assignment, the second term moves the codebook (the first
two terms of van den Oord et al. 2017, eq. 3, here with a fixed u).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gumbel_attention as ga
from gumbel_attention.impl.problem import AttentionProblem, compute_dtype
from gumbel_attention.impl.reference import scores_of
from gumbel_attention.state import AttentionState
from harness.errors import UsageError

Batches = Iterable[dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close the keys with the largest score are to the averages, the mean over heads, layer by layer.

    Attributes:
        agreement: share of queries whose key with the largest score is the nearest one.
        error: squared distance of its value from the average, relative to that of the average from 0.
        least_error: the same of the nearest key.
    """

    agreement: list[float]
    error: list[float]
    least_error: list[float]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What :func:`transfer_choices` did: steps, seconds, its first batch before it and its last batch after it."""

    steps: int
    seconds: float
    before: Agreement
    after: Agreement


def transfer_choices(
    model: nn.Module, batches: Batches, steps: int, learning_rate: float, layers: tuple[int | str, ...] | None = None
) -> Transfer:
    """Trains the queries, keys and values of a model for hard attention; it stays a model with its own attention.

    Adam, its rate falling linearly to 0, without dropout.

    Args:
        model: of transformers, not patched.
        batches: inputs, without labels; gone through as often as it takes.
        steps: how many batches.
        learning_rate: at the first.
        layers: those that will be hard; None is all.

    Raises:
        UsageError: a layer has no queries and keys to look at, or a sink.
    """
    started, training = time.perf_counter(), model.training
    config = ga.GumbelAttentionConfig(noise="none", layers=layers)
    teacher = copy.deepcopy(model).requires_grad_(False)
    with ga.patch_model(model, config), ga.patch_model(teacher, config):
        pair = _Pair(model.eval(), teacher.eval())
        stream = itertools.chain.from_iterable(itertools.repeat(batches))
        optimizer, before = None, None
        for step, batch in enumerate(itertools.islice(stream, steps)):
            problems = list(pair.problems(batch))
            before = before or _agreement(problems)
            loss = torch.stack([choice_loss(ours, theirs) for ours, theirs in problems]).mean()
            model.zero_grad()
            loss.backward()
            if optimizer is None:  # those that make queries, keys and values are known by their gradients
                learns = [parameter for parameter in model.parameters() if parameter.grad is not None]
                optimizer = torch.optim.Adam(learns, lr=learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 - step / steps)
            optimizer.step()
        with torch.no_grad():
            after = _agreement(list(pair.problems(batch)))
    model.zero_grad()
    model.train(training)
    assert before is not None
    return Transfer(steps, time.perf_counter() - started, before, after)


def freeze_choices(model: nn.Module, layers: tuple[int | str, ...] | None = None) -> None:
    """Queries and keys learn no more: what makes them, in the layers that are hard, asks for no gradient.

    They are known by the gradients of the scores, from each layer's inputs on.

    Args:
        model: of transformers, not patched.
        layers: those that are hard; None is all.

    Raises:
        UsageError: something makes values, too, or see :func:`transfer_choices`.
    """
    training, device = model.training, next(model.parameters()).device
    with ga.patch_model(model, ga.GumbelAttentionConfig(noise="none", layers=layers)):
        model.eval()
        problems = list(_Pair(model, model).problems({"input_ids": torch.ones(1, 2, dtype=torch.long, device=device)}))
    model.train(training)
    makes_scores = {name for ours, _ in problems for name in _makers(model, _scores(ours))}
    makes_values = {name for ours, _ in problems for name in _makers(model, ours.value)}
    joint = sorted(makes_scores & makes_values)
    if joint:
        raise UsageError(
            f"freeze_choice: {joint[0]} makes queries, keys and values together, and only the first two are to stay. "
            "Set freeze_choice: false."
        )
    for name in makes_scores:
        model.get_parameter(name).requires_grad_(False)


def _makers(model: nn.Module, result: Tensor) -> list[str]:
    """Names of the parameters that the result depends on."""
    named = list(model.named_parameters())
    gradients = torch.autograd.grad(result.sum(), [one for _, one in named], allow_unused=True, retain_graph=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None]


def choice_loss(ours: AttentionProblem, theirs: AttentionProblem) -> Tensor:
    """Cross entropy of our scores at the keys with values nearest to their averages, plus the error of our choice."""
    averages, counted = _averages(theirs)
    scores, values = _scores(ours), _values(ours)
    nearest = _nearest(averages, scores, values)
    choice = nn.functional.cross_entropy(scores[counted], nearest[counted])
    return choice + _error(averages, values, scores.argmax(-1), counted)


class _Pair:
    """The patched model, and its copy whose inputs every layer gets.

    Args:
        model: that learns.
        teacher: its copy.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        self.teacher = teacher
        states = {name: module for name, module in model.named_modules() if isinstance(module, AttentionState)}
        self._layers = [
            (model.get_submodule(name.rpartition(".")[0]), state, *_of(teacher, name))
            for name, state in states.items()
        ]

    def problems(self, batch: dict[str, Tensor]) -> Iterator[tuple[AttentionProblem, AttentionProblem]]:
        """For each layer what it is asked by the model and by its copy, from the copy's inputs."""
        device = next(self.teacher.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        calls: list[list[tuple[Any, Any]]] = [[] for _ in self._layers]
        with ExitStack() as stack:
            asked = [stack.enter_context(_listening(state)) for _, _, _, state in self._layers]
            for (_, _, layer, _), own in zip(self._layers, calls, strict=True):
                hook = layer.register_forward_pre_hook(partial(_keep, own), with_kwargs=True)
                stack.callback(hook.remove)
            with torch.no_grad():
                self.teacher(**inputs)
        for (layer, state, _, _), own, theirs in zip(self._layers, calls, asked, strict=True):
            _check(own, theirs)
            args, kwargs = own[0]
            with _listening(state) as ours:
                layer(*args, **kwargs)
            yield ours[0], theirs[0]


def _keep(calls: list[tuple[Any, Any]], _: nn.Module, args: Any, kwargs: Any) -> None:
    calls.append((args, kwargs))


def _of(teacher: nn.Module, name: str) -> tuple[nn.Module, AttentionState]:
    """The copy's layer and its state."""
    state = teacher.get_submodule(name)
    assert isinstance(state, AttentionState)
    return teacher.get_submodule(name.rpartition(".")[0]), state


@contextmanager
def _listening(state: AttentionState) -> Iterator[list[AttentionProblem]]:
    """Within this context every call of the layer is kept in the list."""
    calls: list[AttentionProblem] = []
    with state.observed(calls.append):
        yield calls


def _check(calls: list[tuple[Any, Any]], asked: list[AttentionProblem]) -> None:
    """Raises UsageError unless a layer was called once, asked for attention once, and has no sink."""
    if len(calls) == len(asked) == 1 and asked[0].sinks is None:
        return
    sink = " with a sink" if asked and asked[0].sinks is not None else ""
    raise UsageError(
        "choice_steps and freeze_choice are for layers that a forward pass calls once, without sinks; one was called "
        f"{len(calls)} times and asked for attention {len(asked)} times{sink}. Set choice_steps: 0, freeze_choice: "
        "false."
    )


def _scores(problem: AttentionProblem) -> Tensor:
    """S (B, H, Lq, Lk), -inf for keys that do not take part."""
    visible = problem.visible()
    scores = scores_of(problem, visible)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _values(problem: AttentionProblem) -> Tensor:
    """The values (B, H, Lk, Dv) in the scores' dtype, 0 for keys that no query sees."""
    _, values = problem.hidden_keys_and_values()
    return values.to(compute_dtype(values.dtype)).repeat_interleave(problem.query.shape[1] // values.shape[1], 1)


@torch.no_grad()
def _averages(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """What the problem's scores average to (B, H, Lq, Dv), and which queries (B, H, Lq) count.

    Those whose own key no query sees are padding.
    """
    scores = _scores(problem)
    counted = (scores > -torch.inf).any(-1)
    seen = problem.seen_keys()
    if seen is not None and problem.query.shape[2] == problem.key.shape[2]:
        counted = counted & seen
    return scores.softmax(-1).nan_to_num() @ _values(problem), counted


@torch.no_grad()
def _nearest(averages: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Keys (B, H, Lq) that take part and whose values are nearest to the averages."""
    return torch.cdist(averages, values).masked_fill(scores == -torch.inf, torch.inf).argmin(-1)


def _error(averages: Tensor, values: Tensor, keys: Tensor, counted: Tensor) -> Tensor:
    """Squared distance of the keys' values from the averages, relative to that of the averages from 0."""
    read = torch.take_along_dim(values, keys[..., None], -2)
    return (read - averages)[counted].square().sum() / averages[counted].square().sum()


@torch.no_grad()
def _agreement(problems: list[tuple[AttentionProblem, AttentionProblem]]) -> Agreement:
    rows = []
    for ours, theirs in problems:
        averages, counted = _averages(theirs)
        scores, values = _scores(ours), _values(ours)
        keys = scores.argmax(-1), _nearest(averages, scores, values)
        errors = [_error(averages, values, key, counted).item() for key in keys]
        rows.append([(keys[0] == keys[1])[counted].float().mean().item(), *errors])
    agreement, error, least = (list(column) for column in zip(*rows, strict=True))
    return Agreement(agreement, error, least)
