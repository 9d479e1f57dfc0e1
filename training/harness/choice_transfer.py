r"""Scores that learn which one key to read in the average's place, before the choice becomes hard.

A head with weights :math:`a = \mathrm{softmax}(S)` gives :math:`u = \sum_j a_j v_j`. Made hard, it reads the value of
the key with the largest weight, which is often far from u. The key to read is the one whose value is nearest,

.. math:: j^* = \mathrm{argmin}_j \|v_j - u\|^2 , \qquad \mathrm{loss} = -\log \mathrm{softmax}(S)_{j^*} ,

the mean over queries, heads and layers. u comes from a copy of the model that stays as it was, and every layer reads
the inputs that it has there: what one layer learns does not disturb another, and only what makes queries and keys gets
a gradient. No labels are used. What is nearest is found as in vector quantisation (van den Oord et al. 2017), with the
keys' values for a codebook.
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
from gumbel_attention.impl.problem import AttentionProblem
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
    """Trains the queries and keys of a model for hard attention; it stays a model with its own attention.

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
            if optimizer is None:  # those that make queries and keys are known by their gradients
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


def choice_loss(ours: AttentionProblem, theirs: AttentionProblem) -> Tensor:
    """Cross entropy of our scores at the keys whose values are nearest to the averages that their scores make."""
    distances, counted = _distances(theirs)
    scores = _scores(ours)
    return nn.functional.cross_entropy(scores[counted], distances.argmin(-1)[counted])


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
        f"choice_steps prepares layers that a forward pass calls once, without sinks; one was called {len(calls)} "
        f"times and asked for attention {len(asked)} times{sink}. Set choice_steps: 0."
    )


def _scores(problem: AttentionProblem) -> Tensor:
    """S (B, H, Lq, Lk), -inf for keys that do not take part."""
    visible = problem.visible()
    scores = scores_of(problem, visible)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _average(problem: AttentionProblem, scores: Tensor) -> tuple[Tensor, Tensor]:
    """What the problem's scores average to (B, H, Lq, Dv), and the values (B, H, Lk, Dv), in their dtype."""
    _, value = problem.hidden_keys_and_values()
    value = value.to(scores.dtype).repeat_interleave(problem.query.shape[1] // value.shape[1], 1)
    return scores.softmax(-1).nan_to_num() @ value, value


@torch.no_grad()
def _distances(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Squared distances (B, H, Lq, Lk) of the values from the averages, and which queries (B, H, Lq) count.

    Those whose own key no query sees are padding.
    """
    scores = _scores(problem)
    hidden = scores == -torch.inf
    counted = ~hidden.all(-1)
    seen = problem.seen_keys()
    if seen is not None and problem.query.shape[2] == problem.key.shape[2]:
        counted = counted & seen
    return torch.cdist(*_average(problem, scores)).square().masked_fill(hidden, torch.inf), counted


@torch.no_grad()
def _agreement(problems: list[tuple[AttentionProblem, AttentionProblem]]) -> Agreement:
    rows = []
    for ours, theirs in problems:
        distances, counted = _distances(theirs)
        power = _average(theirs, _scores(theirs))[0].square().sum(-1)[counted].sum()
        keys = _scores(ours).argmax(-1), distances.argmin(-1)
        errors = [torch.take_along_dim(distances, key[..., None], -1)[..., 0][counted].sum() / power for key in keys]
        rows.append([(keys[0] == keys[1])[counted].float().mean().item(), *(error.item() for error in errors)])
    agreement, error, least = (list(column) for column in zip(*rows, strict=True))
    return Agreement(agreement, error, least)
