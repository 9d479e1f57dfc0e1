"""A small transformer that answers a question by attending to the sentences of a story."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import gumbel_attention as ga
from tasks.babi import PADDING, StoryBatch


class StoryOutput(NamedTuple):
    """What `StoryModel` returns: B stories, T hops, N facts, A answers."""

    logits: Tensor  # (B, A)
    weights: Tensor  # (B, T, N) attention over the facts
    picks: Tensor  # (B, T) the fact with the largest weight in each hop


class SentenceEncoder(nn.Module):
    """Word and word-position embeddings, one transformer layer, mean over the words.

    Args:
        vocabulary_size: number of word numbers.
        width: size of the embeddings.
        num_heads: heads of the transformer layer.
        max_words: longest sentence.
    """

    def __init__(self, vocabulary_size: int, width: int, num_heads: int = 2, max_words: int = 16) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.position = nn.Embedding(max_words, width)
        self.layer = nn.TransformerEncoderLayer(
            width, num_heads, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, sentences: Tensor) -> Tensor:
        """Encodes (M, W) word numbers, each sentence with at least one word, as (M, E)."""
        if sentences.shape[1] > self.position.num_embeddings:
            raise ValueError(
                f"expected sentences of at most {self.position.num_embeddings} words, "
                f"got {sentences.shape[1]}; raise max_words"
            )
        padded = sentences == PADDING
        embedded = self.word(sentences) + self.position.weight[: sentences.shape[1]]
        encoded = self.norm(self.layer(embedded, src_key_padding_mask=padded))
        used = (~padded).unsqueeze(-1).to(encoded.dtype)
        return (encoded * used).sum(1) / used.sum(1)


class StoryModel(nn.Module):
    """Encodes the sentences, attends from the question to the facts in one or more hops, names the answer.

    A fact is its encoded sentence plus an embedding of its recency: 0 for the last fact before the question,
    1 for the one before that, and so on. The first hop's query is the encoded question; each hop adds to it
    what it read.

    Args:
        vocabulary_size: number of word numbers.
        num_answers: number of answers.
        width: size of the embeddings.
        hops: attention hops, as many as the question has supporting facts.
        max_facts: recencies told apart; older facts share the last one.
        max_words: longest sentence.
        config: the attention's setting.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_answers: int,
        *,
        width: int = 32,
        hops: int = 1,
        max_facts: int = 64,
        max_words: int = 16,
        config: ga.GumbelAttentionConfig | None = None,
    ) -> None:
        super().__init__()
        self.sentence = SentenceEncoder(vocabulary_size, width, max_words=max_words)
        self.recency = nn.Embedding(max_facts, width)
        self.attention = nn.ModuleList(ga.GumbelSetAttention(width, config=config) for _ in range(hops))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(hops))
        self.classifier = nn.Linear(width, num_answers)

    def set_tau(self, tau: float) -> None:
        """Changes the temperature of every hop."""
        for attention in self.attention:
            attention.set_tau(tau)

    def forward(self, batch: StoryBatch) -> StoryOutput:
        """Answers the questions of a batch."""
        facts = self._encode_facts(batch)
        state = self.sentence(batch.question)
        weights = []
        for attention, norm in zip(self.attention, self.norm, strict=True):
            read = attention(facts, state.unsqueeze(1), mask=batch.fact_mask)
            state = norm(state + read.output.squeeze(1))
            weights.append(read.weights[:, 0, 0])
        stacked = torch.stack(weights, 1)
        return StoryOutput(self.classifier(state), stacked, stacked.argmax(-1))

    def _encode_facts(self, batch: StoryBatch) -> Tensor:
        """Encodes each different sentence once; padded facts are zero."""
        different, which = torch.unique(batch.facts[batch.fact_mask], dim=0, return_inverse=True)
        encoded = self.sentence(different)[which]
        facts = encoded.new_zeros(*batch.fact_mask.shape, encoded.shape[-1])
        facts[batch.fact_mask] = encoded
        count = batch.fact_mask.sum(1, keepdim=True)
        recency = count - 1 - torch.arange(batch.fact_mask.shape[1], device=count.device)
        recency = recency.clamp(0, self.recency.num_embeddings - 1)
        return facts + self.recency(recency) * batch.fact_mask.unsqueeze(-1)
