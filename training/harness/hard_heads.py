"""What the hard choices of a model are worth: accuracy by the number of hard layers, what the choices depend on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEASURES = ("varies", "differs", "bits", "first", "own", "last")


def hardness_curves(patch: Any, evaluate: Callable[[], float]) -> dict[str, list[float]]:
    """What ``evaluate`` gives with 0, 1, ... all layers hard, from the top and from the bottom, without noise.

    Args:
        patch: of the model that ``evaluate`` runs, in eval; it stays as it is.
        evaluate: a measure of the model.
    """
    count = len(patch.layers)
    curves: dict[str, list[float]] = {"top_down": [], "bottom_up": []}
    with patch.noise(False), patch.hard(False):
        for hard in range(count + 1):
            for name, places in (("top_down", range(count - hard, count)), ("bottom_up", range(hard))):
                if hard in (0, count) and name == "bottom_up":
                    curves[name].append(curves["top_down"][-1])  # the same layers
                    continue
                with patch.hard(True, layers=list(places)) if hard else patch.hard(False):
                    curves[name].append(evaluate())
    return curves


@torch.no_grad()
def choices_of(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """The key that each head attends to most, of every sequence, padding left out.

    Args:
        model: of transformers, in eval, with self-attention layers that give their weights.
        batches: inputs with ``input_ids`` and perhaps ``attention_mask`` (B, L).

    Returns:
        One int64 tensor (layers, heads, length) for each sequence; keys and queries count its tokens from 0.

    Raises:
        ValueError: the model gives no weights.
    """
    found = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        layers = model(**inputs, output_attentions=True).attentions
        if not layers:
            raise ValueError(f"{type(model).__name__} gives no attention weights: patch it, or make it eager.")
        keys = torch.stack([weights.argmax(-1) for weights in layers], 1)  # (B, layers, heads, L)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for chosen, kept in zip(keys, mask, strict=True):
            place = kept.long().cumsum(0) - 1
            found.append(place[chosen[..., kept]].cpu())
    return found


def dependence(choices: Sequence[Tensor]) -> dict[str, Tensor]:
    r"""How far the choices of each head depend on what a sequence says, beyond its length.

    A head that looks at positions alone chooses the same key for the same query in all sequences of one length. Those
    of a length are compared query by query; with :math:`p_k` the share of them that choose key k:

    * ``differs``: the probability that two different sequences choose differently, without bias;
    * ``bits``: the entropy :math:`-\sum_k p_k \log_2 p_k`, which is the information of the choice on the sequence, for
      it is a function of it. Of n sequences it is at most log2 n and too small in the mean;
    * ``varies``: the share of queries whose choice is not the same in all of them;
    * ``first``, ``own``, ``last``: the share of choices that are the first token, the query's own, the last.

    Args:
        choices: as :func:`choices_of` gives them; those whose length no other has do not count in the first three.

    Returns:
        Name -> (layers, heads), the means over queries, each length weighed by its sequences' tokens.

    Raises:
        ValueError: no two sequences have the same length.
    """
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for chosen in choices:
        groups[chosen.shape[-1]].append(chosen)
    compared = {length: torch.stack(group) for length, group in groups.items() if len(group) > 1}
    if not compared:
        raise ValueError(f"no two of the {len(choices)} sequences have the same length: there is nothing to compare.")
    weights = {length: group.shape[0] * length for length, group in compared.items()}
    measured = {length: _compare(group) for length, group in compared.items()}
    total = sum(weights.values())
    means = {
        name: torch.stack([weights[length] * of_length[name] for length, of_length in measured.items()]).sum(0) / total
        for name in ("varies", "differs", "bits")
    }
    return means | _places(choices)


def layer_means(measures: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
    """The mean over the heads of each layer, of measures as lists (layers, heads)."""
    return {name: [math.fsum(heads) / len(heads) for heads in layers] for name, layers in measures.items()}


def _compare(group: Tensor) -> dict[str, Tensor]:
    """The measures of n sequences of one length, (n, layers, heads, length), each the mean over queries."""
    count, length = group.shape[0], group.shape[-1]
    chosen = nn.functional.one_hot(group, length).sum(0).double()  # (layers, heads, query, key)
    same = (chosen * (chosen - 1)).sum(-1) / (count * (count - 1))
    return {
        "varies": (chosen.amax(-1) < count).double().mean(-1),
        "differs": (1 - same).mean(-1),
        "bits": torch.special.entr(chosen / count).sum(-1).mean(-1) / torch.log(torch.tensor(2.0)).item(),
    }


def _places(choices: Sequence[Tensor]) -> dict[str, Tensor]:
    queries = sum(chosen.shape[-1] for chosen in choices)

    def share(holds: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        counts = [holds(chosen, torch.arange(chosen.shape[-1])).sum(-1) for chosen in choices]
        return torch.stack(counts).sum(0).double() / queries

    return {
        "first": share(lambda key, query: key == 0),
        "own": share(lambda key, query: key == query),
        "last": share(lambda key, query: key == len(query) - 1),
    }
