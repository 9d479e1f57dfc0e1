"""Stories as one sequence of tokens each, and a BERT of two layers that answers the question at its first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from tasks.babi import PADDING, Story, Vocabulary, words

INITIAL_SCALE = 0.2
"""Of the weights' standard deviation: about 1 / sqrt(width), so that what a layer adds is as large as its input."""

FUNCTION_WORDS = frozenset({"where", "is", "to", "the", "over", "a", "at"})
"""Words that tell nothing about the answer; leaving them out makes the sequences shorter."""


@dataclass(frozen=True)
class SequenceBatch:
    """Stories as B sequences of L tokens, padded on the right to the longest.

    Attributes:
        input_ids: (B, L) ``question [SEP] fact [SEP] ... fact [SEP]``, the oldest fact first, without function words:
            the first token is who is asked about.
        attention_mask: (B, L) 1 at tokens, 0 at padding.
        token_type_ids: (B, L) 0 at the question, n at the nth fact before it, 1 for the last one.
        position_ids: (B, L) counted in each sentence from 0.
        answer: (B,) answer numbers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.answer)

    def select(self, rows: Tensor | slice) -> SequenceBatch:
        """Returns the chosen stories, without columns that only pad."""
        longest = int(self.attention_mask[rows].sum(1).max())
        tokens = {name: tensor[rows][:, :longest] for name, tensor in self.inputs().items()}
        return SequenceBatch(**tokens, answer=self.answer[rows])

    def repeat(self, times: int) -> SequenceBatch:
        """Returns the batch so many times over, one copy after the other."""
        tokens = {name: tensor.repeat(times, 1) for name, tensor in self.inputs().items()}
        return SequenceBatch(**tokens, answer=self.answer.repeat(times))

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        return {name: tensor for name, tensor in vars(self).items() if name != "answer"}


def encode_sequences(stories: Sequence[Story], vocabulary: Vocabulary) -> SequenceBatch:
    """Turns stories into one padded batch.

    Raises:
        ValueError: there are none, or an answer that the vocabulary does not know.
    """
    if not stories:
        raise ValueError("stories: expected at least one story, got none; pass what generate_stories returns")
    unknown = sorted({story.answer for story in stories} - set(vocabulary.answers))
    if unknown:
        raise ValueError(f"expected answers among {vocabulary.answers}, got {unknown}; generate more training stories")
    rows = [_tokens(story, vocabulary) for story in stories]
    input_ids, token_type_ids, position_ids = (
        pad_sequence([torch.tensor(row[part]) for row in rows], batch_first=True) for part in range(3)
    )
    answer = torch.tensor([vocabulary.answer_index[story.answer] for story in stories])
    return SequenceBatch(input_ids, (input_ids != PADDING).long(), token_type_ids, position_ids, answer)


def _tokens(story: Story, vocabulary: Vocabulary) -> tuple[list[int], list[int], list[int]]:
    """Word numbers, sentence numbers and positions in the sentence of a story's tokens."""
    separate = vocabulary.size  # the one token that is no word, numbered after them
    said = [_content(vocabulary, sentence) for sentence in (story.question, *story.facts)]
    sentences = [[*sentence, separate] for sentence in said]
    numbers = [0, *range(len(story.facts), 0, -1)]
    tokens = [word for sentence in sentences for word in sentence]
    types = [number for number, sentence in zip(numbers, sentences, strict=True) for _ in sentence]
    positions = [position for sentence in sentences for position in range(len(sentence))]
    return tokens, types, positions


def _content(vocabulary: Vocabulary, sentence: str) -> list[int]:
    return vocabulary.encode(" ".join(word for word in words(sentence) if word not in FUNCTION_WORDS))


def story_encoder(
    vocabulary: Vocabulary, sentences: int, longest: int, *, width: int = 32, heads: int = 2
) -> BertForSequenceClassification:
    """A two-layer BERT with random weights, without dropout, that classifies by the state of its first token.

    Keys start equal to queries, so that a token's scores are largest for tokens like it: of its sentence, of its word.
    On stories of three facts and eight actors softmax then needed 200 steps to 90 %; from independent keys it was
    still choosing among the places told after 300.

    Args:
        vocabulary: words and answers.
        sentences: most sentences before the question.
        longest: most tokens of a story.
        width: of the hidden states; the feed-forward layers are twice as wide.
        heads: attention heads in each layer.
    """
    config = BertConfig(
        vocab_size=vocabulary.size + 1,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=longest,
        type_vocab_size=sentences + 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(vocabulary.answers),
        pad_token_id=PADDING,
        initializer_range=INITIAL_SCALE,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    return model
