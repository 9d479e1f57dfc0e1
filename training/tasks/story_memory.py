"""An end-to-end memory network whose reading is Gumbel attention.

Sukhbaatar et al. 2015, End-To-End Memory Networks (arXiv:1503.08895), called MemN2N there.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

import gumbel_attention as ga
from tasks.babi import PADDING, StoryBatch
from tasks.story_model import StoryOutput

INITIAL_STD = 0.1
"""Of the embeddings, as in the paper (section 4.2)."""


def position_encoding(words: Tensor, width: int) -> Tensor:
    """What multiplies the embedding of each word, so that a sum over the words knows their order.

    l_kj = (1 - j/J) - (k/width)(1 - 2j/J) for word j of J and component k, both counted from 1 (section 4.1).

    Args:
        words: (M, W) word numbers, 0 where there is no word.
        width: size of the embeddings.

    Returns:
        (M, W, width), 0 where there is no word.
    """
    used = words != PADDING
    place = (used.cumsum(1) / used.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
    component = torch.arange(1, width + 1, device=words.device) / width
    return ((1 - place) - component * (1 - 2 * place)) * used.unsqueeze(-1)


class SentenceEmbedding(nn.Module):
    """A sentence as the sum of its words' embeddings, weighted by their position; the paper's A, B or C.

    Args:
        vocabulary_size: number of word numbers.
        width: size of the embeddings.
    """

    def __init__(self, vocabulary_size: int, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary_size, width)
        nn.init.normal_(self.word.weight, std=INITIAL_STD)

    def forward(self, words: Tensor, encoding: Tensor | None = None) -> Tensor:
        """Embeds (M, W) word numbers as (M, width); ``encoding``: their :func:`position_encoding`, if at hand."""
        if encoding is None:
            encoding = position_encoding(words, self.word.embedding_dim)
        return (self.word(words) * encoding).sum(1)


class MemoryNetwork(nn.Module):
    """Reads the facts of a story in one or more hops, from the question on, and names the answer.

    m_i = A x_i + T_A(age_i), c_i = C x_i + T_C(age_i), u = B q; each hop u <- H u + attention(u, m, c), all hops with
    the same parameters (the paper's layer-wise tying); the answer is the largest of W u. Age is 0 for the last fact
    before the question, 1 for the one before that, and so on (temporal encoding). Unlike in the paper the attention,
    a :class:`gumbel_attention.GumbelSetAttention`, has projections and divides its scores by sqrt(width).

    In training the first ``soft_start`` batches are read with softmax(scores), whatever the settings are: as with the
    paper's linear start, the choice is not made before there is something to choose by. The batches are counted in
    the state_dict. Evaluation is always by the settings.

    Args:
        vocabulary_size: number of word numbers.
        num_answers: number of answers.
        width: size of the embeddings.
        hops: how often the facts are read.
        max_facts: ages told apart; older facts share the last one.
        soft_start: training batches with softmax.
        config: the attention's setting.

    Raises:
        ValueError: ``hops`` or ``max_facts`` is below 1, or ``soft_start`` below 0.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_answers: int,
        *,
        width: int = 32,
        hops: int = 3,
        max_facts: int = 64,
        soft_start: int = 0,
        config: ga.GumbelAttentionConfig | None = None,
    ) -> None:
        if hops < 1 or max_facts < 1 or soft_start < 0:
            raise ValueError(
                f"expected hops and max_facts >= 1 and soft_start >= 0, got {hops}, {max_facts} and {soft_start}."
            )
        super().__init__()
        self.key, self.value, self.question = (SentenceEmbedding(vocabulary_size, width) for _ in range(3))
        self.key_age, self.value_age = (nn.Embedding(max_facts, width) for _ in range(2))
        for age in (self.key_age, self.value_age):
            nn.init.normal_(age.weight, std=INITIAL_STD)
        self.attention = nn.ModuleList([ga.GumbelSetAttention(width, bias=False, config=config)])
        self.carry = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, num_answers, bias=False)
        self.hops, self.soft_start = hops, soft_start
        self.batches: Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def set_tau(self, tau: float) -> None:
        """Changes the temperature of all hops."""
        self.attention[0].set_tau(tau)

    def forward(self, batch: StoryBatch) -> StoryOutput:
        """Answers the questions of a batch."""
        soft = self.training and self.soft_start > 0 and int(self.batches) < self.soft_start
        if self.training:
            self.batches += 1
        keys, values = self._memory(batch)
        state = self.question(batch.question).unsqueeze(1)
        weights = []
        (attention,) = self.attention
        with ga.soft_attention(self) if soft else contextlib.nullcontext():
            for _ in range(self.hops):
                read = attention(keys, state, mask=batch.fact_mask, values=values)
                state = self.carry(state) + read.output
                weights.append(read.weights[:, 0, 0])
        stacked = torch.stack(weights, 1)
        return StoryOutput(self.classifier(state.squeeze(1)), stacked, stacked.argmax(-1))

    def _memory(self, batch: StoryBatch) -> tuple[Tensor, Tensor]:
        """m and c, (B, N, width) each; 0 for padded facts."""
        ages = fact_ages(batch.fact_mask)[batch.fact_mask].clamp(max=self.key_age.num_embeddings - 1)
        words = batch.facts[batch.fact_mask]
        encoding = position_encoding(words, self.key.word.embedding_dim)
        keys = self.key(words, encoding) + self.key_age(ages)
        values = self.value(words, encoding) + self.value_age(ages)
        empty = keys.new_zeros(*batch.fact_mask.shape, keys.shape[-1])
        places = (batch.fact_mask,)
        return empty.index_put(places, keys), empty.index_put(places, values)


def fact_ages(fact_mask: Tensor) -> Tensor:
    """How many facts come after each fact and before the question, (B, N); 0 for padding."""
    count = fact_mask.sum(1, keepdim=True)
    return (count - 1 - torch.arange(fact_mask.shape[1], device=count.device)).clamp(min=0)
