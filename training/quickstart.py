"""Softmax against ST-Gumbel attention on generated stories: two accuracies and a picture, in about a minute.

Stories and questions in the manner of bAbI task 1 (Weston et al. 2015, arXiv:1502.05698) are generated in
memory. A small transformer learns twice, from the same initialisation and the same order of the data: once
averaging the sentences with softmax weights, once reading the one sentence that ST-Gumbel attention picks.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch.nn import functional as F

import gumbel_attention as ga
from tasks.babi import Story, StoryBatch, Vocabulary, WorldSettings, encode_stories, generate_stories
from tasks.story_model import StoryModel

SHOWN = 3
NEXT = "accelerate launch training/finetune.py --config configs/finetune/sst2_minilm.yaml"


@dataclass
class Result:
    """What one arm's trained model does on the test stories.

    Attributes:
        accuracy: share of right answers.
        gold_share: share of stories in which the sentence with the most attention is the supporting fact.
        seconds: training time.
        answers: (stories,) answer numbers.
        weights: (stories, facts) attention weights.
        picks: (stories,) the sentence with the most attention.
    """

    accuracy: float
    gold_share: float
    seconds: float
    answers: torch.Tensor
    weights: torch.Tensor
    picks: torch.Tensor


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Softmax against ST-Gumbel attention on generated stories.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart_output"), help="results folder")
    parser.add_argument("--seed", type=int, default=0, help="of stories, initialisation, order and noise")
    parser.add_argument("--train_stories", type=_positive, default=2000, help="number of training stories")
    parser.add_argument("--test_stories", type=_positive, default=500, help="number of test stories")
    parser.add_argument("--epochs", type=_positive, default=20, help="passes over the training stories")
    parser.add_argument("--batch_size", type=_positive, default=64, help="stories in a step")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--tau_start", type=float, default=2.0, help="ST-Gumbel's first temperature")
    parser.add_argument("--tau_end", type=float, default=0.5, help="ST-Gumbel's last temperature")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def make_stories(args: argparse.Namespace) -> tuple[list[Story], list[Story]]:
    """Generates the training and the test stories, from different seeds."""
    train = WorldSettings(stories=args.train_stories, facts=6, distractors=2)
    test = WorldSettings(stories=args.test_stories, facts=6, distractors=2)
    return generate_stories(train, 2 * args.seed), generate_stories(test, 2 * args.seed + 1)


def train_model(
    model: StoryModel, data: StoryBatch, args: argparse.Namespace, tau_at: Callable[[int], float], name: str
) -> float:
    """Trains a model and returns the seconds it took."""
    start = time.perf_counter()
    order = torch.Generator().manual_seed(args.seed)
    steps_per_epoch = -(-len(data) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, epochs=args.epochs, steps_per_epoch=steps_per_epoch
    )
    model.train()
    step = 0
    for epoch in range(1, args.epochs + 1):
        losses = []
        for rows in torch.randperm(len(data), generator=order).split(args.batch_size):
            model.set_tau(tau_at(step))
            batch = data.select(rows)
            loss = F.cross_entropy(model(batch).logits, batch.answer)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            step += 1
        if epoch % 5 == 0 or epoch == args.epochs:
            mean, tau = sum(losses) / len(losses), tau_at(step - 1)
            print(f"  {name:<9}  epoch {epoch:>2} of {args.epochs}  loss {mean:.3f}  tau {tau:.2f}")
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(model: StoryModel, data: StoryBatch, seconds: float) -> Result:
    """Answers the test questions without noise."""
    model.eval()
    output = model(data)
    answers, picks = output.logits.argmax(-1), output.picks[:, 0]
    return Result(
        accuracy=(answers == data.answer).float().mean().item(),
        gold_share=data.supports.gather(1, picks.unsqueeze(1)).float().mean().item(),
        seconds=seconds,
        answers=answers,
        weights=output.weights[:, 0],
        picks=picks,
    )


def run_arms(
    args: argparse.Namespace, train: list[Story], test: list[Story], vocabulary: Vocabulary
) -> dict[str, Result]:
    """Trains and tests both arms from the same initialisation, on the same data in the same order."""
    steps = args.epochs * -(-len(train) // args.batch_size)
    arms = {
        "softmax": (
            ga.GumbelAttentionConfig(noise="none"),
            ga.temperature_schedule("constant", 1.0, 1.0, steps),
        ),
        "ST-Gumbel": (
            ga.GumbelAttentionConfig(noise="gumbel", hard=True, tau=args.tau_start),
            ga.temperature_schedule("exponential", args.tau_start, args.tau_end, steps),
        ),
    }
    train_data, test_data = encode_stories(train, vocabulary), encode_stories(test, vocabulary)
    results = {}
    for name, (config, tau_at) in arms.items():
        torch.manual_seed(args.seed)
        model = StoryModel(vocabulary.size, len(vocabulary.answers), config=config)
        seconds = train_model(model, train_data, args, tau_at, name)
        results[name] = evaluate(model, test_data, seconds)
    return results


def draw(stories: Sequence[Story], vocabulary: Vocabulary, results: dict[str, Result], path: Path) -> None:
    """Draws for each story its sentences with the gold one marked, softmax's weights and ST-Gumbel's pick."""
    rows = [len(story.facts) for story in stories]
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.06)
    figure = Figure(figsize=(10.5, 0.9 + sum(0.27 * count + 1.15 for count in rows)), layout=layout)
    figure.suptitle("Which sentence does the answer come from?   ★ = gold supporting fact", fontsize=13)
    grid = figure.subplots(len(stories), 3, squeeze=False, width_ratios=[1.5, 1.4, 1.15], height_ratios=rows)
    for index, (story, panels) in enumerate(zip(stories, grid, strict=True)):
        answers = {name: vocabulary.answers[int(result.answers[index])] for name, result in results.items()}
        _draw_sentences(panels[0], story)
        _draw_weights(panels[1], story, results["softmax"].weights[index].tolist())
        _draw_pick(panels[2], story, int(results["ST-Gumbel"].picks[index]))
        for panel, name in zip(panels[1:], ("softmax", "ST-Gumbel"), strict=True):
            verdict = "right" if answers[name] == story.answer else "wrong"
            panel.set_title(f"{name} answers: {answers[name]} ({verdict})", fontsize=10)
    figure.savefig(path, dpi=130)


def _rows(panel: Axes, story: Story) -> None:
    """Gives a panel one row per sentence, the first on top, with a band behind the gold one."""
    panel.set_ylim(len(story.facts) - 0.5, -0.5)
    panel.set_yticks([])
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    for gold in story.supports:
        panel.axhspan(gold - 0.45, gold + 0.45, color="0.9", zorder=0)


def _draw_sentences(panel: Axes, story: Story) -> None:
    _rows(panel, story)
    panel.set_xlim(0, 1)
    panel.set_xticks([])
    panel.set_title(f"{story.question}   gold: {story.answer}", fontsize=10, fontweight="bold", loc="left")
    for row, fact in enumerate(story.facts):
        gold = row in story.supports
        weight = "bold" if gold else "normal"
        panel.text(0.08, row, f"{row + 1}  {fact}", va="center", fontsize=10, fontweight=weight)
        if gold:
            panel.text(0.0, row, "★", va="center", fontsize=12)


def _draw_weights(panel: Axes, story: Story, weights: list[float]) -> None:
    _rows(panel, story)
    panel.set_xlim(0, 1.15)
    panel.set_xticks([0, 0.5, 1])
    panel.tick_params(labelsize=8)
    panel.set_xlabel("attention weight", fontsize=8)
    for row in range(len(story.facts)):
        panel.barh(row, weights[row], height=0.6, color="0.45", edgecolor="black", linewidth=0.6)
        panel.text(weights[row] + 0.02, row, f"{weights[row]:.2f}", va="center", fontsize=8)


def _draw_pick(panel: Axes, story: Story, pick: int) -> None:
    _rows(panel, story)
    panel.set_xlim(0, 1)
    panel.set_xticks([])
    panel.set_xlabel("■ the one sentence it reads", fontsize=8)
    for row in range(len(story.facts)):
        if row == pick:
            panel.plot(0.5, row, "s", color="black", markersize=9)
        else:
            panel.plot(0.5, row, "o", markerfacecolor="white", markeredgecolor="0.5", markersize=5)


def write_numbers(args: argparse.Namespace, results: dict[str, Result], seconds: float, path: Path) -> None:
    """Writes settings, versions and results as JSON."""
    shown = ("accuracy", "gold_share", "seconds")
    numbers = {
        "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gumbel_attention": ga.__version__,
        },
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "arms": {name: {key: round(getattr(arm, key), 4) for key in shown} for name, arm in results.items()},
    }
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Runs the quickstart and returns the result of each arm."""
    args = parse_args(argv)
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train, test = make_stories(args)
    print(f"{len(train)} training and {len(test)} test stories; where is each actor? seed {args.seed}")
    vocabulary = Vocabulary(train)
    results = run_arms(args, train, test, vocabulary)
    picture = args.output_dir / "quickstart.png"
    draw(test[:SHOWN], vocabulary, results, picture)
    write_numbers(args, results, time.perf_counter() - start, args.output_dir / "quickstart.json")
    print("\narm        test accuracy  attends most to the gold sentence")
    for name, result in results.items():
        print(f"{name:<9}  {result.accuracy:>12.1%}   {result.gold_share:.1%}")
    print(f"\nPicture: {picture} (the first {min(SHOWN, len(test))} test stories). Next: {NEXT}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    main()
