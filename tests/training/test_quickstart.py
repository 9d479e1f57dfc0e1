"""The quickstart end to end in small, and the story model's attention."""

import json

import pytest
import torch

import gumbel_attention as ga
import quickstart
from tasks.babi import Vocabulary, WorldSettings, encode_stories, generate_stories, parse_babi
from tasks.story_model import StoryModel

SMALL = ["--train_stories", "48", "--test_stories", "20", "--epochs", "2", "--batch_size", "16"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "new" / "folder"
    return folder, quickstart.main([*SMALL, "--output_dir", str(folder)])


def story_model(config: ga.GumbelAttentionConfig, **kw):
    stories = generate_stories(WorldSettings(stories=12, questions=2, distractors=1), seed=0)
    vocabulary = Vocabulary(stories)
    torch.manual_seed(0)
    model = StoryModel(vocabulary.size, len(vocabulary.answers), config=config, **kw)
    return model, encode_stories(stories, vocabulary)


def test_small_run_writes_its_picture_and_numbers(small_run):
    folder, results = small_run
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "quickstart.json").read_text())
    assert numbers["settings"]["seed"] == 0
    assert numbers["versions"]["torch"] == torch.__version__
    assert set(numbers["arms"]) == set(results) == {"softmax", "ST-Gumbel"}
    for arm in numbers["arms"].values():
        assert 0 <= arm["accuracy"] <= 1
        assert 0 <= arm["gold_share"] <= 1


def test_arms_differ_in_the_choice(small_run):
    _, results = small_run
    hard, soft = results["ST-Gumbel"].weights, results["softmax"].weights
    assert torch.equal(hard.sort(-1).values[:, :-1], torch.zeros(20, 7))
    assert torch.equal(hard.argmax(-1), results["ST-Gumbel"].picks)
    assert soft.max() < 1


def test_a_run_repeats(small_run, tmp_path):
    again = quickstart.main([*SMALL, "--output_dir", str(tmp_path)])
    for name, result in small_run[1].items():
        assert torch.equal(result.weights, again[name].weights)


def test_output_ends_with_the_picture_and_the_next_command(tmp_path, capsys):
    quickstart.main(["--train_stories", "8", "--test_stories", "2", "--epochs", "1", "--output_dir", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert str(tmp_path / "quickstart.png") in last
    assert last.endswith("accelerate launch training/finetune.py --config configs/finetune/sst2_minilm.yaml")


def test_counts_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        quickstart.parse_args(["--epochs", "0"])
    assert "expected a whole number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("hops", [1, 2])
def test_hard_choice_in_eval_is_one_hot_and_deterministic(hops):
    model, batch = story_model(ga.GumbelAttentionConfig(hard=True), hops=hops)
    model.eval()
    first, second = model(batch), model(batch)
    assert first.weights.shape == (24, hops, 14)
    assert torch.equal(first.weights, second.weights)
    expected = torch.nn.functional.one_hot(first.picks, 14).to(first.weights.dtype)
    assert torch.equal(first.weights, expected)
    assert batch.fact_mask.gather(1, first.picks).all()


def test_hard_choice_in_training_is_noisy_and_has_gradients():
    model, batch = story_model(ga.GumbelAttentionConfig(hard=True))
    model.train()
    output = model(batch)
    assert not torch.equal(output.picks, model(batch).picks)
    output.logits.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = {name for name, gradient in gradients.items() if gradient is None}
    assert all("quer" in name for name in missing)
    assert gradients["recency.weight"].abs().sum() > 0


def test_padding_changes_nothing():
    model, batch = story_model(ga.GumbelAttentionConfig(noise="none"))
    model.eval()
    alone = model(batch.select(slice(0, 1)))
    torch.testing.assert_close(alone.logits, model(batch).logits[:1])


def test_recency_is_counted_from_the_question():
    texts = ("1 A b.\n2 C d.\n3 Who?\td\t2\n", "1 E f.\n2 A b.\n3 C d.\n4 Who?\td\t3\n")
    stories = [story for text in texts for story in parse_babi(text)]
    vocabulary = Vocabulary(stories)
    model = StoryModel(vocabulary.size, 1, config=ga.GumbelAttentionConfig(noise="none")).eval()
    facts = model._encode_facts(encode_stories(stories, vocabulary))
    torch.testing.assert_close(facts[0, :2], facts[1, 1:])
    assert not facts[0, 2].any()


def test_long_sentences_are_refused():
    with pytest.raises(ValueError, match="sentences of at most 16 words, got 17"):
        StoryModel(5, 2).sentence(torch.ones(1, 17, dtype=torch.int64))


def test_arms_start_from_the_same_weights():
    soft, _ = story_model(ga.GumbelAttentionConfig(noise="none"))
    hard, _ = story_model(ga.GumbelAttentionConfig(hard=True, tau=2.0))
    torch.testing.assert_close(soft.state_dict(), hard.state_dict(), rtol=0, atol=0)
