"""The random words bit for bit, the noise they give, and the draw of the seed."""

import math
import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gumbel_attention as ga
from gumbel_attention import noise
from gumbel_attention.noise import Coordinates
from integer_noise import integer_word

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
VECTORS = [  # (seed, b, h, H, q, k) -> word, from the specification
    ((0, 0, 0, 1, 0, 0), 0xE55B1B4D),
    ((0, 0, 0, 1, 0, 8), 0xAA09B0BD),
    ((0, 0, 0, 1, 8, 0), 0x8C3325F4),
    ((0, 0, 0, 1, 8, 8), 0x6A53D3AB),
    ((1, 0, 0, 1, 0, 0), 0x30F3600F),
    ((1234567890123456789, 1, 2, 4, 5, 77), 0x09393D4A),
    ((-1, 3, 11, 12, 4095, 65535), 0x7DB09E1D),
    ((42, 0, 7, 8, 2147483647, 2147483639), 0x1371AFA0),
]


def int64(x: int) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int64)


@pytest.mark.parametrize(("where", "word"), VECTORS)
def test_test_vectors(where: tuple[int, ...], word: int) -> None:
    seed, b, h, heads, q, k = where
    assert noise.words(int64(seed), int64(b * heads + h), int64(q), int64(k)).item() == word
    assert integer_word(seed, b * heads + h, q, k) == word


def test_second_stream_vector() -> None:
    assert noise.words(int64(0), int64(0), int64(0), int64(0), stream=1).item() == 0xB6F32740


@pytest.mark.slow
def test_words_equal_python_integers_on_a_million_coordinates() -> None:
    draw, n = np.random.default_rng(1), 1_000_000
    number = np.arange(n)
    near = draw.integers(2**31 - 64, 2**31, size=(2, n))
    far = draw.integers(2 ** draw.integers(1, 32, size=(2, n)))
    columns = (
        draw.integers(-(2**63), 2**63, size=n),
        draw.integers(4096, size=n),
        np.where(number % 4 == 0, near[0], far[0]),
        np.where(number % 4 == 1, near[1], far[1]),
        number % 3,
    )
    seed, bh, q, k, stream = map(torch.from_numpy, columns)
    got = torch.empty(n, dtype=torch.int64)
    for s in range(3):
        of = stream == s
        got[of] = noise.words(seed[of], bh[of], q[of], k[of], s)
    want = torch.tensor([integer_word(*row) for row in zip(*(column.tolist() for column in columns), strict=True)])
    assert torch.equal(got, want)


class ExactIntegers(TorchDispatchMode):
    """Sums and products of int64 are those of Python's integers: none of them wraps."""

    EXACT: ClassVar = {torch.ops.aten.add.Tensor: operator.add, torch.ops.aten.mul.Tensor: operator.mul}

    def __init__(self) -> None:
        super().__init__()
        self.checked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.EXACT and result.dtype == torch.int64:
            exact = self.EXACT[func](*(torch.as_tensor(x).numpy().astype(object) for x in args))
            assert np.all(exact == result.numpy().astype(object)), f"{func} leaves int64"
            self.checked += 1
        return result


def test_no_product_leaves_int64() -> None:
    """C++ leaves undefined what a signed product beyond its type is; a compiler took its upper word for positive."""
    seed, bh = torch.randint(-(2**63), 2**63 - 1, (100, 1)), torch.tensor([0, 1, 4095, 2**31 - 1])
    with ExactIntegers() as plain:
        noise.words(seed, bh, torch.randint(2**31, (100, 1)), torch.randint(2**31, (1, 4)))
    assert plain.checked > 40
    with pytest.raises(AssertionError, match="leaves int64"), ExactIntegers():
        int64(2**32 - 1) * 0xD2511F53


@pytest.mark.parametrize(("q0", "k0"), [(0, 0), (5, 13), (2**31 - 40, 2**31 - 21), (16, 7)])
def test_grid_equals_single_words(q0: int, k0: int) -> None:
    seed, bh = int64(-77)[None, None], torch.arange(6).reshape(2, 3)
    grid = noise.word_grid(seed, bh, q0, 37, k0, 21, stream=2)
    q, k = q0 + torch.arange(37), k0 + torch.arange(21)
    assert torch.equal(grid, noise.words(seed[..., None, None], bh[..., None, None], q[:, None], k, 2))


def test_a_shard_draws_what_the_whole_would() -> None:
    whole = Coordinates(int64(9), batch=2, heads=8, q_len=40, k_len=30).words(0)
    part = Coordinates(int64(9), 2, 3, 10, 12, q_offset=17, k_offset=18, h_offset=4, h_total=8).words(0)
    assert torch.equal(part, whole[:, 4:7, 17:27, 18:30])


def test_offsets_of_each_example_equal_integer_offsets() -> None:
    offsets = torch.tensor([3, 21])
    both = Coordinates(int64(9), 2, 2, 5, 6, q_offset=offsets, k_offset=offsets).words(0)
    for b, offset in enumerate(offsets.tolist()):
        one = Coordinates(int64(9), 2, 2, 5, 6, q_offset=offset, k_offset=offset).words(0)
        assert torch.equal(both[b], one[b])


def test_a_seed_for_each_example_ignores_its_place_in_the_batch() -> None:
    forward = Coordinates(torch.tensor([5, 6]), 2, 3, 4, 4).words(0)
    backward = Coordinates(torch.tensor([6, 5]), 2, 3, 4, 4).words(0)
    assert torch.equal(forward[0], backward[1])
    assert torch.equal(forward[0], Coordinates(int64(5), 1, 3, 4, 4).words(0)[0])


@pytest.mark.slow
def test_a_hundred_million_draws_are_finite() -> None:
    worst_low, worst_high = math.inf, -math.inf
    for bh in range(24):
        draws = noise.gumbel(noise.word_grid(int64(3), int64(bh), 0, 2048, 0, 2048)).float()
        assert draws.isfinite().all()
        worst_low, worst_high = min(worst_low, draws.min().item()), max(worst_high, draws.max().item())
    assert -3.14 < worst_low < -2.5
    assert 15.0 < worst_high < 22.88


def test_extreme_words_are_finite_and_large_values_keep_their_bits() -> None:
    words = torch.tensor([0, 1, 2, 2**32 - 2, 2**32 - 1])
    got = noise.gumbel(words)
    assert got.isfinite().all()
    exact = [-math.log(-math.log1p(-(w + 0.5) / 2**32)) for w in words.tolist()]
    torch.testing.assert_close(got, torch.tensor(exact, dtype=torch.float64), rtol=1e-15, atol=0)
    assert got.float().unique().numel() == 5
    assert noise.normal(words, words.flip(0)).isfinite().all()


def _exact_logistic(word: int) -> float:
    """(log(1 - v) - log(v)) / sqrt(2) in 50 decimal digits."""
    with localcontext(prec=50):
        v = (Decimal(word) + Decimal("0.5")) / 2**32
        return float(((1 - v).ln() - v.ln()) / Decimal(2).sqrt())


def test_logistic_noise_is_exact_to_the_last_digits_at_both_ends_and_in_the_middle() -> None:
    middle, top = 2**31, 2**32 - 1
    words = [0, 1, 2, 1000, 2**16, middle - 2, middle - 1, middle, middle + 1, top - 1000, top - 2, top - 1, top]
    words += torch.randint(0, 2**32, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    got = noise.logistic(torch.tensor(words))
    assert got.isfinite().all()
    exact = torch.tensor([_exact_logistic(word) for word in words], dtype=torch.float64)
    torch.testing.assert_close(got, exact, rtol=1e-15, atol=0)
    assert got[:13].float().unique().numel() == 13
    assert got[0] == got.max()  # a small word is a large value


def test_logistic_noise_is_symmetric_to_the_bit() -> None:
    words = noise.word_grid(int64(5), int64(0), 0, 64, 0, 64)
    assert torch.equal(noise.logistic(words), -noise.logistic(2**32 - 1 - words))


FALSE_ALARM = 1e-4
"""Of each test below, on a fresh seed; the seeds are fixed, so a pass stays a pass."""
RARE = 1e-6
"""The same, of the tests that all families share."""


def _uniforms(stream: int) -> torch.Tensor:
    return noise.uniform(noise.word_grid(int64(11), torch.arange(4), 0, 256, 0, 256, stream)).flatten()


def test_gumbel_has_its_distribution() -> None:
    draws = noise.sample("gumbel", Coordinates(int64(11), 1, 4, 256, 256)).flatten().numpy()
    assert stats.kstest(draws, stats.gumbel_r.cdf).pvalue > FALSE_ALARM
    assert stats.kstest(draws * 1.03, stats.gumbel_r.cdf).pvalue < FALSE_ALARM  # the control: three percent too wide


def test_normal_has_the_variance_of_gumbel() -> None:
    draws = noise.sample("normal", Coordinates(int64(12), 1, 4, 256, 256)).flatten().numpy()
    scale = math.pi / math.sqrt(6)
    assert stats.kstest(draws, stats.norm(scale=scale).cdf).pvalue > FALSE_ALARM
    assert stats.kstest(draws * 1.03, stats.norm(scale=scale).cdf).pvalue < FALSE_ALARM


def test_logistic_has_its_distribution() -> None:
    where = Coordinates(int64(13), 1, 4, 256, 256)
    law = stats.logistic(scale=1 / math.sqrt(2))
    assert stats.kstest(noise.sample("logistic", where).flatten().numpy(), law.cdf).pvalue > RARE
    assert stats.kstest(noise.sample("normal", where).flatten().numpy(), law.cdf).pvalue < RARE  # the control


@pytest.mark.parametrize(
    ("family", "mean", "kurtosis"), [("gumbel", 0.5772156649015329, 5.4), ("normal", 0.0, 3.0), ("logistic", 0.0, 4.2)]
)
def test_every_family_has_its_mean_and_the_variance_of_gumbel(family: str, mean: float, kurtosis: float) -> None:
    """Two z tests share the false alarms; the spread of the sample variance follows from the kurtosis."""
    draws = noise.sample(family, Coordinates(int64(14), 1, 4, 256, 256)).flatten()
    variance, n = math.pi**2 / 6, draws.numel()

    def z(x: torch.Tensor) -> tuple[float, float]:
        of_mean = (x.mean().item() - mean) / math.sqrt(variance / n)
        of_variance = ((x - mean).square().mean().item() / variance - 1) / math.sqrt((kurtosis - 1) / n)
        return abs(of_mean), abs(of_variance)

    bound = stats.norm.isf(RARE / 4)
    assert max(z(draws)) < bound
    assert z(mean + (draws - mean) * 1.03)[1] > bound  # the controls: three percent too wide, and moved by 0.02
    assert z(draws + 0.02)[0] > bound


def test_a_family_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise family 'cauchy'; there are 'gumbel', 'normal' and 'logistic'"):
        noise.sample("cauchy", Coordinates(int64(0), 1, 1, 1, 1))


def test_streams_are_independent() -> None:
    first, second = _uniforms(0), _uniforms(1)
    n = first.numel()
    z = torch.corrcoef(torch.stack([first, second]))[0, 1].item() * math.sqrt(n)
    assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)
    control = torch.corrcoef(torch.stack([first, second + 0.05 * first]))[0, 1].item() * math.sqrt(n)
    assert abs(control) > stats.norm.isf(FALSE_ALARM / 2)


def test_neighbours_are_uncorrelated() -> None:
    """Lags along both axes, next head and next seed: 36 correlations, Bonferroni-corrected."""
    grid = noise.uniform(noise.word_grid(int64(0), torch.arange(3), 0, 300, 0, 300)) - 0.5
    other = noise.uniform(noise.word_grid(int64(1), torch.arange(3), 0, 300, 0, 300)) - 0.5
    pairs = [(grid[0], grid[1]), (grid[0], other[0])]
    for lag in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65, 127):
        pairs += [(grid[0, lag:], grid[0, :-lag]), (grid[0, :, lag:], grid[0, :, :-lag])]

    def z(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs((a * b).mean().item() * 12 * math.sqrt(a.numel()))

    bound = stats.norm.isf(FALSE_ALARM / 2 / len(pairs))
    assert max(z(a, b) for a, b in pairs) < bound
    shifted = grid[0].roll(1, dims=1)
    assert z(grid[0, :, :-1], shifted[:, 1:]) > bound  # the control: the same stream, moved by one


def test_manual_seed_repeats_the_seed_and_noise_off_draws_nothing() -> None:
    x = torch.randn(2, 2, 5, 4)
    torch.manual_seed(3)
    first, second = ga.gumbel_attention(x, x, x), ga.gumbel_attention(x, x, x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(ga.gumbel_attention(x, x, x), first)
    state = torch.get_rng_state()
    ga.gumbel_attention(x, x, x, noise="none", hard=True)
    ga.gumbel_attention(x, x, x, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def _loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    def layer(h: torch.Tensor) -> torch.Tensor:
        h = (h @ weight).reshape(1, 1, 6, 4)
        return ga.gumbel_attention(h, h, h, tau=0.7)

    return layer(x).square().sum()


def _checkpointed_loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return checkpoint(_loss, x, weight, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("loss", "backend"),
    [
        (_loss, "aot_eager"),
        (_loss, "inductor"),
        (_checkpointed_loss, "aot_eager"),
        (_checkpointed_loss, "aot_eager_decomp_partition"),  # with inductor's division into forward and backward
    ],
)
def test_seed_under_compile_and_checkpoint(loss: Loss, backend: str) -> None:
    """The compiled gradient is that of the noise the compiled forward pass drew, checkpointed or not."""
    torch._dynamo.reset()
    x, weight = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    torch.manual_seed(7)
    plain = _loss(x, weight)
    (want,) = torch.autograd.grad(plain, weight)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    torch.manual_seed(7)
    got = compiled(x, weight)
    (grad,) = torch.autograd.grad(got, weight)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(grad, want)
    assert compiled(x, weight).item() != got.item()  # the next call draws anew


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_to_plain_cpp_the_words_are_the_same() -> None:
    """Without vector instructions, as where inductor knows none of the processor."""
    torch._dynamo.reset()
    seed, bh = int64(5)[None], torch.arange(3)[None]
    compiled = torch.compile(noise.word_grid, backend="inductor", fullgraph=True, options={"cpp.simdlen": 1})
    assert torch.equal(compiled(seed, bh, 3, 30, 5, 20), noise.word_grid(seed, bh, 3, 30, 5, 20))


@pytest.mark.parametrize("training", [False, True])
def test_a_compiler_does_not_merge_draws(training: bool) -> None:
    """Two layers of one graph draw two seeds, also where the partitioner eliminates common subexpressions."""
    torch._dynamo.reset()
    x = torch.ones(1, requires_grad=training)

    def two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * noise.draw_seed(device=x.device), x.exp().log() * noise.draw_seed(device=x.device)

    first, second = torch.compile(two, backend="aot_eager", fullgraph=True)(x)
    assert first.item() != second.item()


def test_a_generator_of_ones_own_breaks_recomputation() -> None:
    """The control for the test above: noise that the checkpoint cannot replay gives another gradient."""
    own = torch.Generator().manual_seed(0)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = (x @ weight).reshape(1, 1, 6, 4)
        return ga.gumbel_attention(h, h, h, seed=int(torch.randint(2**31, (), generator=own))).square().sum()

    x, weight = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    (want,) = torch.autograd.grad(loss(x, weight), weight)
    own.manual_seed(0)
    (got,) = torch.autograd.grad(checkpoint(loss, x, weight, use_reentrant=False), weight)
    assert (got - want).norm() > 1e-2 * want.norm()


def test_the_draw_is_tagged() -> None:
    op = torch.ops.gumbel_attention.draw_seed.default
    assert torch.Tag.nondeterministic_seeded in op.tags
    torch.library.opcheck(
        noise._draw_seed, (torch.empty(0),), {"device": torch.device("cpu")}, test_utils="test_schema"
    )
