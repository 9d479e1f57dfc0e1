"""What is measured of attention while a model runs: right against weights in full, and without a trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import gumbel_attention as ga
from gumbel_attention.arguments import attention_problem
from gumbel_attention.attend import attend
from gumbel_attention.diagnostics import MEASURES, _spread
from gumbel_attention.impl import cpu
from gumbel_attention.impl.problem import AttentionProblem
from gumbel_attention.noise import draw_seed
from gumbel_attention.state import AttentionState
from models import HEADS

ALL = 10**6
Setup = tuple[dict[str, Any], dict[str, Any]]


class Layer(nn.Module):
    """One attention layer and nothing else."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.gumbel = AttentionState(ga.GumbelAttentionConfig(**settings), HEADS)

    def forward(self, *inputs: Tensor, need_weights: bool = False, **arguments: Any) -> Any:
        return attend(self.gumbel, self.training, *inputs, need_weights=need_weights, **arguments)


def qkv(
    batch: int = 3, heads: int = 4, kv_heads: int = 4, q_len: int = 9, k_len: int = 9, **kind: Any
) -> list[Tensor]:
    shapes = ((batch, heads, q_len, 8), (batch, kv_heads, k_len, 8), (batch, kv_heads, k_len, 8))
    return [2.0 * torch.randn(shape, **kind) for shape in shapes]


def padding(k_len: int, *hidden: int) -> Tensor:
    """(B, 1, 1, Lk): that many keys hidden at the end of each example."""
    return torch.stack([torch.arange(k_len) < k_len - n for n in hidden])[:, None, None]


def _problem(given: list[Tensor]) -> AttentionProblem:
    return attention_problem(*given, is_causal=True, seed=1)


def weights_of(settings: dict[str, Any], seed: Tensor, inputs: list[Tensor], **arguments: Any) -> Tensor:
    """All weights of the relaxation, as the reference gives them."""
    keep = ("tau", "noise", "noise_scale", "top_k")
    chosen = {name: settings[name] for name in keep if name in settings}
    grouped = {"enable_gqa": inputs[0].shape[1] != inputs[1].shape[1]}
    weights = ga.gumbel_attention_with_info(*inputs, **arguments, **grouped, **chosen, seed=seed).weights
    assert weights is not None
    return weights


def entropy(row: Tensor) -> float:
    return -sum(p * math.log(p) for p in row.tolist() if p > 0.0)


def naive(p: Tensor, w: Tensor, visible: Tensor, counted: Tensor) -> dict[str, float]:
    """The measures by their definitions, row by row."""
    rows: list[dict[str, float]] = []
    for b, h, q in counted.nonzero().tolist():
        plain, used, n = p[b, h, q], w[b, h, q], int(visible[b, h, q].sum())
        rows.append(
            {
                "entropy": entropy(plain),
                "normalized_entropy": entropy(plain) / math.log(n),
                "relaxed_entropy": entropy(used),
                "max_weight": used.max().item(),
                "argmax_flip_rate": float(plain.argmax() != used.argmax()),
                "saturated_share": float(used.max() == 1.0),
                "zero_gradient_share": float(sum(x != 0.0 for x in used.tolist()) == 1),
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in MEASURES}


def measured(layer: nn.Module, *inputs: Any, rows: int = ALL, **arguments: Any) -> dict[str, float]:
    """The measures of the only layer, after ``torch.manual_seed(5)``."""
    torch.manual_seed(5)
    with ga.collect_diagnostics(layer, rows) as diagnostics:
        layer(*inputs, **arguments)
    (values,) = diagnostics.per_layer().values()
    return {name: value.item() for name, value in values.items()}


SETUPS: dict[str, Setup] = {
    "soft": ({"tau": 0.7}, {}),
    "hard": ({"tau": 0.7, "hard": True}, {}),
    "cold": ({"tau": 0.03}, {}),
    "normal": ({"noise": "normal", "noise_scale": 2.0}, {}),
    "quiet": ({"noise": "none", "tau": 2.0}, {}),
    "causal": ({}, {"is_causal": True}),
    "padded": ({}, {"attn_mask": padding(9, 0, 3, 5)}),
    "causal and padded": ({}, {"attn_mask": padding(9, 0, 3, 5), "is_causal": True}),
    "lost rows": ({}, {"attn_mask": torch.arange(9)[:, None] % 3 > torch.zeros(9, dtype=torch.int64)}),
    "heads see different keys": ({}, {"attn_mask": torch.arange(4 * 81).reshape(4, 9, 9) * 37 % 101 < 25}),
    "bias": ({}, {"attn_mask": torch.linspace(-3.0, 3.0, 4 * 81).sin().reshape(4, 9, 9)}),
    "softcap": ({"tau": 0.5}, {"softcap": 1.5}),
    "scale": ({}, {"scale": 0.1}),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_with_all_rows_the_measures_are_those_of_the_weights_in_full(name: str, kv_heads: int) -> None:
    settings, arguments = SETUPS[name]
    given = qkv(kv_heads=kv_heads)
    torch.manual_seed(5)
    seed = draw_seed(device=given[0].device)
    p = weights_of({**settings, "noise": "none"}, seed, given, **arguments)
    w = weights_of(settings, seed, given, **arguments)
    mask = arguments.get("attn_mask", torch.ones(1, dtype=torch.bool))
    visible = mask.expand_as(p) if mask.dtype == torch.bool else torch.ones_like(p, dtype=torch.bool)
    if arguments.get("is_causal"):
        visible = visible.tril()
    seen = visible.any(dim=(1, 2))[:, None]  # a key that no query sees is padding, and so is its query
    counted = (visible.sum(-1) >= 2) & seen
    expected = naive(p, w, visible, counted)

    found = measured(Layer(**settings), *given, **arguments)
    assert list(found) == list(MEASURES)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if name == "soft":  # a control: other noise gives other numbers
        other = naive(p, weights_of(settings, seed + 1, given, **arguments), visible, counted)
        assert found["relaxed_entropy"] != pytest.approx(other["relaxed_entropy"], rel=1e-5)
        assert 0.0 < found["argmax_flip_rate"] < 1.0
    if name == "cold":
        assert 0.0 < found["zero_gradient_share"] < found["saturated_share"] < 1.0


def test_a_sample_of_rows_has_the_measures_of_these_rows() -> None:
    given, keep = qkv(), padding(9, 0, 3, 5)
    counted = keep[:, 0, 0]  # self-attention: what is no key is no query
    sample = _spread(counted, 5)
    rows = torch.zeros(3, 4, 9, dtype=torch.bool)
    rows[sample.example, :, sample.query] = True
    torch.manual_seed(5)
    seed = draw_seed(device=given[0].device)
    p, w = (weights_of({"noise": noise}, seed, given, attn_mask=keep) for noise in ("none", "gumbel"))
    visible = keep.expand_as(p)
    found = measured(Layer(), *given, attn_mask=keep, rows=5)
    assert found == pytest.approx(naive(p, w, visible, rows), rel=1e-5, abs=1e-6)
    everything = naive(p, w, visible, counted[:, None].expand(3, 4, 9))
    assert found["entropy"] != pytest.approx(everything["entropy"], rel=1e-5)  # a control


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 31, 200])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_the_rows_are_eligible_different_and_spread(rows: int, share: float) -> None:
    eligible = torch.rand(8, 40) < share
    sample = _spread(eligible, rows)
    there = int(eligible.sum())
    picked = (sample.example * 40 + sample.query)[sample.counted]
    assert len(picked) == min(rows, there) == len(set(picked.tolist()))
    assert eligible.flatten()[picked].all()
    if there >= rows:
        ranks = eligible.flatten().cumsum(0)[picked] - 1
        shares = torch.arange(rows + 1) * there // rows
        assert ((shares[:-1] <= ranks) & (ranks < shares[1:])).all()
    if share == 1.0 and rows == 16:
        assert len(set(sample.query.tolist())) > 8  # not the same position of every example


def test_sinks_subsets_and_float64() -> None:
    given, sinks = qkv(dtype=torch.float64), torch.tensor([2.0, -1.0, 0.0, 1.0])
    torch.manual_seed(5)
    seed = draw_seed(device=given[0].device)
    rest = [weights_of({"noise": noise}, seed, given, sinks=sinks) for noise in ("none", "gumbel")]
    p, w = (torch.cat([x, 1.0 - x.sum(-1, keepdim=True)], dim=-1) for x in rest)
    everything = torch.ones_like(p, dtype=torch.bool)
    found = measured(Layer(), *given, sinks=sinks)
    assert found == pytest.approx(naive(p, w, everything, everything[..., 0]), rel=1e-6)

    rest = [weights_of({"noise": noise, "top_k": 2}, seed, given) for noise in ("none", "gumbel")]
    expected = naive(*rest, everything[..., 1:], everything[..., 0])
    found = measured(Layer(top_k=2), *given)
    assert "zero_gradient_share" not in found
    del expected["zero_gradient_share"], expected["argmax_flip_rate"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    scores = given[0] @ given[1].mT / math.sqrt(8)
    hard = ga.gumbel_attention_with_info(*given, hard=True, top_k=2, seed=seed).indices
    assert hard is not None
    flips = (scores.topk(2).indices.sort().values != hard.sort().values).any(-1)
    assert found["argmax_flip_rate"] == pytest.approx(flips.double().mean().item())


def test_other_estimators_say_nothing_of_the_gradient() -> None:
    for estimator in ("gumbel_rao", "reinmax", "score_function"):
        found = measured(Layer(hard=True, estimator=estimator), *qkv())
        assert list(found) == [name for name in MEASURES if name != "zero_gradient_share"]


@pytest.mark.parametrize("impl", ["reference", "blockwise", "cpu"])
def test_the_choice_measured_is_the_choice_that_each_implementation_makes(impl: str) -> None:
    if impl == "cpu" and cpu.available() is not None:
        pytest.skip(f"the CPU kernels are not available: {cpu.available()}")
    query, key, _ = qkv(q_len=40, k_len=40)
    value = torch.eye(40).expand(3, 4, 40, 40)
    layer = Layer(hard=True, impl=impl)
    torch.manual_seed(5)
    with ga.collect_diagnostics(layer, ALL) as diagnostics:
        output = layer(query, key, value).output
    flips = (output.argmax(-1) != (query @ key.mT).argmax(-1)).float().mean()
    assert 0.1 < flips < 0.9
    assert diagnostics.summary()["argmax_flip_rate"].item() == pytest.approx(flips.item(), abs=1e-6)
    assert measured(layer, query, key, value) == measured(Layer(hard=True), query, key, value)


def test_sdpa_is_measured_too() -> None:
    given = qkv()
    assert measured(Layer(noise="none", impl="sdpa"), *given) == measured(Layer(noise="none"), *given)


def test_examples_with_seeds_of_their_own() -> None:
    query, key, value = qkv()
    layer, seeds = Layer(hard=True), torch.tensor([7, -1, 2**40])
    layer.gumbel.seeds = seeds
    hard = ga.gumbel_attention_with_info(query, key, value, hard=True, seed=seeds).indices
    assert hard is not None
    flips = (hard != (query @ key.mT).argmax(-1)).float().mean().item()
    assert measured(layer, query, key, value)["argmax_flip_rate"] == pytest.approx(flips)


def test_without_noise_nothing_flips() -> None:
    given = qkv()
    layer = Layer(tau=0.7)
    assert measured(layer, *given)["argmax_flip_rate"] > 0.1  # a control
    for quiet in (Layer(noise="none"), copy.deepcopy(layer).eval(), Layer(noise_scale=0.0)):
        found = measured(quiet, *given)
        assert found["argmax_flip_rate"] == 0.0
        assert found["relaxed_entropy"] == found["entropy"]
    layer.gumbel.set_noise_scale(0.0)
    assert measured(layer, *given)["argmax_flip_rate"] == 0.0


def test_a_row_counted_as_without_gradient_has_none_and_others_have_some() -> None:
    query, key, _ = qkv(q_len=32, k_len=6)
    weights_seen = []
    for tau, low, high in ((1.0, 0.0, 0.0), (0.02, 0.2, 0.95), (1e-7, 1.0, 1.0)):
        layer = Layer(tau=tau)
        query.requires_grad_(True)
        gone = torch.ones(3, 4, 32, dtype=torch.bool)
        for column in range(6):  # the gradient of each weight by itself, times more than any loss gives
            value = torch.zeros(3, 4, 6, 1)
            value[..., column, 0] = 1e30
            torch.manual_seed(5)
            (grad,) = torch.autograd.grad(layer(query, key, value, need_weights=True).output.sum(), query)
            gone &= (grad == 0.0).all(-1)
        found = measured(layer, query.detach(), key, key)["zero_gradient_share"]
        weights_seen.append(found)
        assert low <= found <= high
        assert found == pytest.approx(gone.float().mean().item(), abs=1e-6)
    assert weights_seen[0] < weights_seen[1] < weights_seen[2]


def test_a_learned_query_is_no_padding() -> None:
    layer = ga.GumbelSetAttention(8, 2, num_queries=4)
    mask = torch.tensor([[True, True, True, False]])
    with ga.collect_diagnostics(layer, ALL) as diagnostics:
        layer(torch.randn(1, 4, 8), mask=mask)
    assert diagnostics.counted()[""].item() == 4 * 2
    attention = ga.GumbelMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 4, 8)
    with ga.collect_diagnostics(attention, ALL) as diagnostics:
        attention(x, x, x, key_padding_mask=~mask)
    assert diagnostics.counted()[""].item() == 3 * 2


def test_contexts_nest_and_leave_nothing_behind() -> None:
    layer, other, given = Layer(), Layer(), qkv()
    before = {name: dict(vars(module)) for name, module in layer.named_modules()}
    outer = ga.collect_diagnostics(layer, ALL)
    first = outer.__enter__()
    layer(*given)
    inner = ga.collect_diagnostics(nn.ModuleList([layer, other]), ALL)
    second = inner.__enter__()
    layer(*given)
    other(*given)
    assert len(layer.gumbel.observers) == 2
    with pytest.raises(RuntimeError, match="stop"):
        inner.gen.throw(RuntimeError("stop"))  # as where the block raises it
    layer(*given)
    outer.__exit__(None, None, None)
    layer(*given)
    assert {name: count.item() / (3 * 9 * 4) for name, count in second.counted().items()} == {"0": 1.0, "1": 1.0}
    assert first.counted()[""].item() == 3 * 3 * 9 * 4
    assert {name: dict(vars(module)) for name, module in layer.named_modules()} == before

    one, two = ga.collect_diagnostics(layer), ga.collect_diagnostics(layer)
    early, late = one.__enter__(), two.__enter__()
    one.__exit__(None, None, None)  # not the last first
    layer(*given)
    two.__exit__(None, None, None)
    assert early.unmeasured == [""]
    assert late.unmeasured == []
    assert layer.gumbel.observers == ()


def test_heads_that_are_left_out_do_not_count() -> None:
    given = qkv()
    flips = [measured(Layer(heads=[head]), *given)["argmax_flip_rate"] for head in range(4)]
    assert measured(Layer(), *given)["argmax_flip_rate"] == pytest.approx(sum(flips) / 4)
    assert len(set(flips)) > 1


def test_the_summary_is_the_mean_over_the_layers_that_counted() -> None:
    model, given = nn.ModuleList([Layer(tau=0.5), Layer(tau=3.0), Layer(hard=True, estimator="reinmax")]), qkv()
    with ga.collect_diagnostics(model) as diagnostics:
        for layer in model[:2]:
            layer(*given)
        model[2](*(x[:, :, :1] for x in given))  # one key: no choice
    layers = diagnostics.per_layer()
    assert layers["2"]["entropy"].isnan()
    assert "zero_gradient_share" not in layers["2"]
    for name, value in diagnostics.summary().items():
        assert value.shape == ()
        assert not value.requires_grad
        torch.testing.assert_close(value, (layers["0"][name] + layers["1"][name]) / 2)


def test_the_expectation_is_measured_as_what_it_is() -> None:
    layer, given = Layer(tau=0.1), qkv()
    with ga.soft_attention(layer):
        found = measured(layer, *given)
    assert found == measured(Layer(noise="none", tau=1.0), *given)


def test_what_cannot_be_measured_is_refused() -> None:
    for arguments, error, message in (
        ((nn.Linear(2, 2),), ValueError, "no attention of this library"),
        (("model",), TypeError, "not its patch"),
        ((Layer(), 0), ValueError, "rows must be an int >= 1"),
        ((Layer(), 2.0), TypeError, "rows must be an int >= 1"),
    ):
        with pytest.raises(error, match=message), ga.collect_diagnostics(*arguments):
            pass
    with ga.collect_diagnostics(Layer()) as diagnostics, pytest.raises(RuntimeError, match="nothing was measured"):
        diagnostics.summary()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that comes into being."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        Largest.entries = max([Largest.entries, *found])
        return result


def test_a_sample_never_costs_the_whole_matrix() -> None:
    given = [x[:, :, :, :4] for x in qkv(1, 2, 2, 3000, 3000)]
    layer = Layer(impl="blockwise")
    with torch.no_grad(), ga.collect_diagnostics(layer, 4), Largest():
        Largest.entries = 0
        layer.gumbel.observers[0](_problem(given))
    sampled = Largest.entries
    assert sampled <= 4 * 2 * 3000 * 4  # keys of the four queries


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by the compiler
@pytest.mark.parametrize("hard", [False, True])
def test_compiled_in_one_graph_the_numbers_are_the_same(hard: bool) -> None:
    layer, given = Layer(hard=hard, impl="reference"), qkv()
    eager = measured(layer, *given)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.manual_seed(5)
        with ga.collect_diagnostics(layer, ALL) as diagnostics:
            compiled(*given)
        (values,) = diagnostics.per_layer().values()
        assert {name: value.item() for name, value in values.items()} == pytest.approx(eager)
    compiled(*given)
    assert counter.frame_count == 2  # one with measuring, one without
