"""The memory network: its encodings against their formulas, its hops, its soft start, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gumbel_attention as ga
import story_qa
from harness.errors import UsageError
from tasks.babi import StoryBatch, Vocabulary, WorldSettings, encode_stories, generate_stories
from tasks.story_answering import StoryArguments, load_model
from tasks.story_memory import MemoryNetwork, fact_ages, position_encoding

STORIES = generate_stories(WorldSettings(2, 12, questions=2), seed=0)
VOCABULARY = Vocabulary(STORIES)
BATCH = encode_stories(STORIES, VOCABULARY)


def network(config: ga.GumbelAttentionConfig | None = None, **sizes: Any) -> MemoryNetwork:
    torch.manual_seed(0)
    sizes = {"width": 8, **sizes}
    return MemoryNetwork(VOCABULARY.size, len(VOCABULARY.answers), config=config, **sizes)


def test_position_encoding_is_the_formula() -> None:
    width, words = 5, torch.tensor([[7, 3, 9, 0], [4, 0, 0, 0], [2, 2, 2, 2]])
    encoding = position_encoding(words, width)
    for row, length in enumerate((3, 1, 4)):
        for j in range(1, 5):
            for k in range(1, width + 1):
                expected = (1 - j / length) - (k / width) * (1 - 2 * j / length) if j <= length else 0.0
                assert encoding[row, j - 1, k - 1].item() == pytest.approx(expected, abs=1e-6)


def test_the_order_of_words_counts() -> None:
    embed = network().key
    one, other = embed(torch.tensor([[2, 3, 4], [4, 3, 2]]))
    assert not torch.allclose(one, other)
    assert torch.equal(embed(torch.tensor([[2, 3, 4, 0]]))[0], one)


def test_ages_count_back_from_the_question() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert fact_ages(mask).tolist() == [[2, 1, 0], [0, 0, 0]]


def test_memory_is_words_plus_age_and_old_facts_share_an_age() -> None:
    model, batch = network(max_facts=3), BATCH.select(torch.tensor([1, 0]))
    keys, values = model._memory(batch)
    for row in range(2):
        count = int(batch.fact_mask[row].sum())
        for fact in range(batch.fact_mask.shape[1]):
            if fact >= count:
                assert not keys[row, fact].any()
                continue
            age = min(count - 1 - fact, 2)
            words = batch.facts[row, fact][None]
            assert torch.allclose(keys[row, fact], model.key(words)[0] + model.key_age.weight[age])
            assert torch.allclose(values[row, fact], model.value(words)[0] + model.value_age.weight[age])


@pytest.mark.parametrize("hops", [1, 3])
def test_hops_are_the_recurrence(hops: int) -> None:
    model = network(ga.GumbelAttentionConfig(noise="none"), hops=hops).double().eval()
    output, (layer,) = model(BATCH), model.attention
    assert output.weights.shape[1] == output.picks.shape[1] == hops
    keys, values = model._memory(BATCH)
    state = model.question(BATCH.question)
    for hop in range(hops):
        scores = torch.einsum("be,bne->bn", layer.q_proj(state), layer.k_proj(keys)) / 8**0.5
        weights = scores.masked_fill(~BATCH.fact_mask, -torch.inf).softmax(-1)
        assert torch.allclose(output.weights[:, hop], weights)
        read = layer.out_proj(torch.einsum("bn,bne->be", weights, layer.v_proj(values)))
        state = model.carry(state) + read
    assert torch.allclose(output.logits, model.classifier(state))


def test_what_pads_changes_nothing() -> None:
    model = network(ga.GumbelAttentionConfig(noise="none")).eval()
    short = BATCH.select(torch.tensor([0]))
    facts = torch.nn.functional.pad(short.facts, (0, 2, 0, 4))
    mask, supports = (torch.nn.functional.pad(x, (0, 4)) for x in (short.fact_mask, short.supports))
    padded = StoryBatch(facts, mask, short.question, short.answer, supports)
    assert torch.allclose(model(padded).logits, model(short).logits, atol=1e-6)


def test_soft_start_ends_after_its_batches_and_is_of_training_alone() -> None:
    model = network(ga.GumbelAttentionConfig(hard=True), soft_start=2)
    plain = network(ga.GumbelAttentionConfig(noise="none")).eval()(BATCH).weights
    assert model.eval()(BATCH).weights.max(-1).values.eq(1).all()
    model.train()
    for _ in range(2):
        assert torch.allclose(model(BATCH).weights, plain)
    assert model(BATCH).weights.max(-1).values.eq(1).all()
    assert model.state_dict()["batches"].item() == 3


def test_soft_start_ignores_noise_and_temperature() -> None:
    configs = [ga.GumbelAttentionConfig(tau=0.1), ga.GumbelAttentionConfig(noise="none", hard=True)]
    one, other = (network(config, soft_start=1)(BATCH).logits for config in configs)
    assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [{"hops": 0}, {"max_facts": 0}, {"soft_start": -1}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected hops and max_facts >= 1 and soft_start >= 0"):
        network(**sizes)


def settings(folder: Path, **changes: Any) -> StoryArguments:
    return StoryArguments(**{
        "architecture": "memory_network", "supporting_facts": 2, "train_stories": 40, "validation_stories": 10,
        "hops": 3, "width": 8, "soft_start": 2, "max_train_steps": 4, "hard": True, "output_dir": str(folder),
        "per_device_train_batch_size": 8, "save_model": True, **changes,
    })  # fmt: skip


def test_a_saved_network_answers_as_it_did(tmp_path: Path) -> None:
    record = story_qa.run(settings(tmp_path))
    model, vocabulary = load_model(tmp_path / "model")
    assert isinstance(model, MemoryNetwork)
    assert (model.hops, model.soft_start, int(model.batches)) == (3, 2, 4)
    stories = generate_stories(WorldSettings(2, 10, facts=6, distractors=2), 1)
    batch = encode_stories(stories, vocabulary)
    right = (model(batch).logits.argmax(-1) == batch.answer).double().mean().item()
    assert record.final["noise_off"]["accuracy"] == pytest.approx(right)


def test_a_run_stopped_in_its_soft_start_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    runs = {name: settings(tmp_path / name, checkpointing_steps=1, keep_last=None) for name in ("whole", "again")}
    story_qa.run(runs["whole"])
    story_qa.run(runs["again"])
    (tmp_path / "again" / "results.json").unlink()
    for folder in (tmp_path / "again").glob("checkpoint*"):
        if not folder.name.endswith("1"):
            folder.rename(tmp_path / folder.name)
    record = story_qa.run(settings(tmp_path / "again", checkpointing_steps=1, resume_from_checkpoint="latest"))
    assert record.resumed_at == [1]
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in runs)
    assert one == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "transformer"}, "soft_start=2 needs architecture: memory_network"),
        ({"soft_start": -1}, "soft_start must be >= 0, got -1"),
        ({"hops": 0}, "hops must be > 0, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(tmp_path, **changes)
