"""The noise as a pure function of (seed, head, query position, key position). Specification, version 1.

``words`` reads as the specification is written: one 32-bit word for each coordinate, from seven Philox rounds
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by seed and head. ``word_grid`` gives
the same words for a rectangle of positions at a quarter of the work: one Philox call serves the 2 x 2 group
``{q, q ^ 8} x {k, k ^ 8}``. Other implementations must match both bit for bit.

torch has no arithmetic on unsigned 32-bit integers, so words are int64 tensors with values in [0, 2^32). A product
of two words may exceed int64, and a C++ compiler that is handed such a product may assume that it does not: each
32-bit constant ``m`` above 2^31 therefore multiplies as ``m - 2^32``, which is the same modulo 2^32 and stays inside.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
WRAP = 1 << 32
GROUP_BIT = 8
ROUNDS = 7
SINK_POSITION = MASK
"""Key position of an attention sink: the same however many keys there are."""

STREAM_NOISE, STREAM_DROPOUT, STREAM_NORMAL, STREAM_FURTHER = 0, 1, 2, 3
NOISE_STD = math.pi / math.sqrt(6.0)
"""Standard deviation of Gumbel(0, 1), given to the other families too."""


@torch.library.custom_op("gumbel_attention::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_seed(unique: Tensor, *, device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


@_draw_seed.register_fake
def _(unique: Tensor, *, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def draw_seed(*, device: torch.device) -> Tensor:
    """One int64 seed, shape (), from the default generator of ``device``, without synchronisation.

    The op's tag keeps a compiler from drawing anew when it recomputes a checkpointed region; there the device must be
    a keyword argument, for that is where the compiler looks for it. Its elimination of common subexpressions does
    not ask for the tag and would merge the draws of all layers into one, but it takes no two ``torch.empty`` for the
    same: an argument that nothing reads keeps the draws apart.
    """
    seed: Tensor = _draw_seed(torch.empty(0, device=device), device=device)
    return seed


def fmix(h: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3 (Appleby)."""
    h = ((h ^ (h >> 16)) * (0x85EBCA6B - WRAP)) & MASK
    h = ((h ^ (h >> 13)) * (0xC2B2AE35 - WRAP)) & MASK
    return h ^ (h >> 16)


def philox_key(seed: Tensor, bh: Tensor) -> tuple[Tensor, Tensor]:
    """The two key words of ``seed`` (int64, all 64 bits count) and the flat head index ``bh``; they broadcast."""
    low, high = seed & MASK, (seed >> 32) & MASK
    ka = fmix(low ^ fmix((bh * (0x9E3779B1 - WRAP) + 0x7F4A7C15) & MASK))
    kb = fmix((high + fmix((ka + bh) & MASK)) & MASK)
    return ka, kb


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], ka: Tensor, kb: Tensor) -> tuple[Tensor, ...]:
    """Seven rounds of Philox 4x32 on broadcastable words: the four words of each counter."""
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = c0 * (0xD2511F53 - WRAP), c2 * (0xCD9E8D57 - WRAP)
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2  # 2^32 c more: the upper words of the unsigned products
        c0, c1, c2, c3 = high1 ^ c1 ^ ka, p1 & MASK, high0 ^ c3 ^ kb, p0 & MASK
        ka, kb = (ka + 0x9E3779B9) & MASK, (kb + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words(seed: Tensor, bh: Tensor, q: Tensor, k: Tensor, stream: int = STREAM_NOISE) -> Tensor:
    """The random word of each coordinate. All arguments are int64 and broadcast; the result is in [0, 2^32)."""
    ka, kb = philox_key(seed, bh)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    four = philox((q & ~GROUP_BIT & MASK, zero + stream, k & ~GROUP_BIT & MASK, zero), ka, kb)
    first_q, first_k = (q & GROUP_BIT) == 0, (k & GROUP_BIT) == 0
    return torch.where(first_q, torch.where(first_k, four[0], four[1]), torch.where(first_k, four[2], four[3]))


def word_grid(
    seed: Tensor, bh: Tensor, q_start: int, q_len: int, k_start: int, k_len: int, stream: int = STREAM_NOISE
) -> Tensor:
    """``words`` for queries ``q_start ...`` and keys ``k_start ...``: shape (*broadcast(seed, bh), q_len, k_len)."""
    ka, kb = philox_key(seed, bh)
    ka, kb = ka[..., None, None], kb[..., None, None]
    q_block, q = _group_leaders(q_start, q_len, seed.device)
    k_block, k = _group_leaders(k_start, k_len, seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    four = philox((q[:, None], zero + stream, k[None, :], zero), ka, kb)
    tiles = [word.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)) for word in four]  # (..., q block, 8, k block, 8)
    rows = [torch.stack(pair, dim=-2).flatten(-3) for pair in (tiles[:2], tiles[2:])]  # (..., q block, 8, k)
    grid = torch.stack(rows, dim=-3).flatten(-4, -2)  # (..., q, k)
    q_skip, k_skip = q_start - 16 * q_block, k_start - 16 * k_block
    return grid[..., q_skip : q_skip + q_len, k_skip : k_skip + k_len]


def _group_leaders(start: int, length: int, device: torch.device) -> tuple[int, Tensor]:
    """First block of 16 positions that ``start ... start + length`` touches; of each block, the 8 with bit 3 unset."""
    first, last = start // 16, (start + length + 15) // 16
    blocks = torch.arange(first, last, device=device, dtype=torch.int64)
    return first, (16 * blocks[:, None] + torch.arange(8, device=device, dtype=torch.int64)).flatten() & MASK


def uniform(word: Tensor) -> Tensor:
    """``(word + 0.5) / 2^32`` in float64: strictly inside (0, 1)."""
    return (word.to(torch.float64) + 0.5) * 2.0**-32


def gumbel(word: Tensor) -> Tensor:
    """Gumbel(0, 1) from a word, in float64: ``-log(-log1p(-v))`` with ``v = uniform(word)``.

    A small word is a large value, so all 32 bits lie in the upper tail; the range is [-3.13, 22.87], always finite.
    """
    return -torch.log(-torch.log1p(-uniform(word)))


def normal(word: Tensor, second: Tensor) -> Tensor:
    """Normal(0, pi^2 / 6) from two words, in float64, by Box and Muller (1958)."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(word)))
    return NOISE_STD * radius * torch.cos(2.0 * math.pi * uniform(second))


def logistic(word: Tensor) -> Tensor:
    """Logistic(0, 1 / sqrt(2)) from a word, in float64: variance pi^2 / 6, as Gumbel's.

    ``(log(1 - v) - log(v)) / sqrt(2)`` with ``v = uniform(word)``, computed as ``sqrt(2) * atanh(1 - 2 v)``: its
    argument is exact, so that no digits cancel near 0, and words ``w`` and ``2^32 - 1 - w`` give opposite values to
    the bit. As for Gumbel a small word is a large value; the range is [-16.18, 16.18], always finite.
    """
    return math.sqrt(2.0) * torch.atanh(1.0 - 2.0 * uniform(word))


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Where a block of scores (batch, heads, q_len, k_len) lies in the infinite field of noise.

    Args:
        seed: int64, () or (batch,); with one seed for each example, b counts as 0.
        q_offset, k_offset: position of the first query and key: an int, or an int64 tensor (batch,).
        h_offset, h_total: the first head, and the number of heads of the whole layer these are a shard of.
    """

    seed: Tensor
    batch: int
    heads: int
    q_len: int
    k_len: int
    q_offset: int | Tensor = 0
    k_offset: int | Tensor = 0
    h_offset: int = 0
    h_total: int | None = None

    def rows(self, rows: slice) -> Coordinates:
        """The coordinates of the queries in ``rows``, a slice with both ends given."""
        return dataclasses.replace(self, q_len=rows.stop - rows.start, q_offset=self.q_offset + rows.start)

    def words(self, stream: int) -> Tensor:
        """The words of the block in ``stream``, (batch, heads, q_len, k_len)."""
        if isinstance(self.q_offset, int) and isinstance(self.k_offset, int):
            seed, bh = self._seed_and_head()
            return word_grid(seed, bh, self.q_offset, self.q_len, self.k_offset, self.k_len, stream)
        k = positions(self.k_offset, self.k_len, self.seed.device)
        return self._words_at(k[:, None, None, :], stream)

    def sink_words(self, stream: int) -> Tensor:
        """The words of the sink column, (batch, heads, q_len, 1)."""
        return self._words_at(torch.full((1, 1, 1, 1), SINK_POSITION, device=self.seed.device), stream)

    def _words_at(self, k: Tensor, stream: int) -> Tensor:
        seed, bh = self._seed_and_head()
        q = positions(self.q_offset, self.q_len, self.seed.device)[:, None, :, None]
        return words(seed[..., None, None], bh[..., None, None], q, k, stream)

    def _seed_and_head(self) -> tuple[Tensor, Tensor]:
        h = torch.arange(self.heads, device=self.seed.device) + self.h_offset
        if self.seed.ndim == 1:
            return self.seed[:, None], h[None, :]
        b = torch.arange(self.batch, device=self.seed.device)
        return self.seed, b[:, None] * (self.h_total or self.heads) + h


def positions(offset: int | Tensor, length: int, device: torch.device) -> Tensor:
    """``offset ... offset + length``: (1, length), or (batch, length) for an offset of each example."""
    first = offset[:, None] if isinstance(offset, Tensor) else offset
    return torch.arange(length, device=device)[None, :] + first


def sample(family: str, where: Coordinates, *, sink: bool = False) -> Tensor:
    """The noise of a family at ``where`` in float64: (batch, heads, q_len, k_len), or the sink column's (..., 1).

    All families have Gumbel's variance, pi^2 / 6; Normal and Logistic noise has mean 0. Only Gumbel noise makes the
    largest of ``scores + noise`` a sample of softmax(scores).

    Raises:
        ValueError: there is no such family.
    """
    draw = where.sink_words if sink else where.words
    if family == "gumbel":
        return gumbel(draw(STREAM_NOISE))
    if family == "normal":
        return normal(draw(STREAM_NOISE), draw(STREAM_NORMAL))
    if family == "logistic":
        return logistic(draw(STREAM_NOISE))
    raise ValueError(f"no noise family {family!r}; there are 'gumbel', 'normal' and 'logistic'.")


def further_gumbel(number: int, where: Coordinates, *, sink: bool = False) -> Tensor:
    """Gumbel noise at ``where`` that is independent of the main noise and of that of every other ``number`` >= 1."""
    draw = where.sink_words if sink else where.words
    return gumbel(draw(STREAM_FURTHER + number - 1))


def dropout_factor(p: float, where: Coordinates) -> Tensor:
    """What dropout of rate ``p`` multiplies the weights by: 0 or 1 / (1 - p), (batch, heads, q_len, k_len)."""
    keep = where.words(STREAM_DROPOUT) >= round(p * 2**32)
    return keep / (1.0 - p) if p < 1.0 else torch.zeros_like(keep, dtype=torch.float32)
