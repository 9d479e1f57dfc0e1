"""Figures of the noise itself: the relaxation against tau, and why the noise is Gumbel's; under a minute.

``relaxed_samples.png`` draws what Jang et al. (2017, arXiv:1611.01144, Figure 1) explain Gumbel-softmax with: the
expectation of the relaxed distribution and single samples at several temperatures. ``families.png`` shows how far
the choice ``argmax(S + noise)`` lies from softmax(S) for each noise family: exactly, by integration, and as sampled
by the library. ``noise_figures.json`` holds the numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from scipy import integrate, special, stats

import gumbel_attention as ga

Numbers = NDArray[np.float64]

FAMILIES = ("gumbel", "normal", "logistic")
STD = np.pi / np.sqrt(6.0)
TAUS = (0.1, 0.5, 1.0, 5.0, 10.0)
CATEGORICAL = (0.05, 0.10, 0.40, 0.25, 0.15, 0.05)
DRAWS_SHOWN = 3
DIRECTION = (1.0, 0.5, 0.0, -0.5, -1.0)
SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
CONFIDENCE = 0.95
LINES = {"gumbel": ("-", "o"), "normal": ("--", "s"), "logistic": (":", "^")}


def log_density(family: str, x: Numbers) -> Numbers:
    """Of the noise family at noise_scale 1, whose variance is pi^2 / 6."""
    if family == "gumbel":
        return -x - np.exp(np.minimum(-x, 700.0))
    if family == "normal":
        return -0.5 * (x / STD) ** 2 - np.log(STD * np.sqrt(2.0 * np.pi))
    y = np.sqrt(2.0) * x
    return special.log_expit(y) + special.log_expit(-y) + 0.5 * np.log(2.0)


def log_distribution(family: str, x: Numbers) -> Numbers:
    """Logarithm of the distribution function of the noise family."""
    if family == "gumbel":
        return -np.exp(np.minimum(-x, 700.0))
    return special.log_ndtr(x / STD) if family == "normal" else special.log_expit(np.sqrt(2.0) * x)


def choice_probabilities(family: str, scores: Sequence[float]) -> Numbers:
    """The probability that ``argmax(scores + noise)`` is i, for each i: the integral of f(x - s_i) prod F(x - s_j).

    f and F are the density and the distribution function of the noise; the product runs over all j but i.

    Raises:
        ArithmeticError: the integrals do not sum to 1 within 1e-10.
    """
    s = np.asarray(scores, dtype=np.float64)

    def integral(i: int) -> float:
        others = np.delete(s, i)

        def integrand(x: float) -> float:
            below = log_distribution(family, x - others).sum()
            return float(np.exp(log_density(family, x - s[i : i + 1])[0] + below))

        low, high = s[i] - 40.0, s[i] + 40.0  # outside lies less than 1e-17 of any of the families
        inside = sorted({float(x) for x in s if low < x < high})
        return float(integrate.quad(integrand, low, high, points=inside, limit=400, epsabs=1e-13, epsrel=1e-11)[0])

    probabilities = np.array([integral(i) for i in range(len(s))])
    total = float(probabilities.sum())
    if abs(total - 1.0) > 1e-10:
        raise ArithmeticError(f"the choice probabilities of {family} for scores {list(scores)} sum to {total:.12g}.")
    return probabilities


def total_variation(p: Numbers, q: Numbers) -> float:
    """Half the sum of absolute differences."""
    return float(0.5 * np.abs(p - q).sum())


def sampled_counts(family: str, scores: Sequence[float], samples: int, seed: int) -> NDArray[np.int64]:
    """How often the library's hard Gumbel-softmax with this noise chooses each entry."""
    logits = torch.tensor(scores, dtype=torch.float64).expand(samples, len(scores))
    return ga.gumbel_softmax(logits, hard=True, noise=family, seed=seed).sum(0).long().numpy()


def favoured_set(probabilities: Numbers, reference: Numbers) -> NDArray[np.bool_]:
    """The entries that are more probable than by the reference; the first one where the two are equal.

    The difference of this set's two probabilities is the total variation, and its sampled share is an estimate of
    it without the bias upwards that the total variation of sampled frequencies has.
    """
    favoured = probabilities > reference + 1e-9
    return favoured if favoured.any() else np.arange(len(reference)) == 0


def family_rows(samples: int, seed: int) -> list[dict[str, Any]]:
    """For each spread and family: choice probabilities, their distance to softmax, and the sampled distance."""
    rows = []
    for spread_index, spread in enumerate(SPREADS):
        scores = [spread * x for x in DIRECTION]
        softmax = special.softmax(scores)
        for family_index, family in enumerate(FAMILIES):
            exact = choice_probabilities(family, scores)
            favoured = favoured_set(exact, softmax)
            counts = sampled_counts(
                family, scores, samples, (seed * len(SPREADS) + spread_index) * len(FAMILIES) + family_index
            )
            share = stats.binomtest(int(counts[favoured].sum()), samples)
            interval = share.proportion_ci(CONFIDENCE, method="exact")
            base = float(softmax[favoured].sum())
            rows.append(
                {
                    "family": family,
                    "spread": spread,
                    "softmax": softmax.tolist(),
                    "exact": exact.tolist(),
                    "counts": counts.tolist(),
                    "total_variation": total_variation(exact, softmax),
                    "sampled": share.statistic - base,
                    "interval": [interval.low - base, interval.high - base],
                }
            )
    return rows


def relaxed_rows(samples: int, seed: int) -> list[dict[str, Any]]:
    """For the hard choice (tau ``None``) and each temperature: mean of the samples, its error, the first samples.

    Every temperature sees the same noise, so a sample is one draw that sharpens as tau falls.
    """
    logits = torch.tensor(CATEGORICAL, dtype=torch.float64).log().expand(samples, -1)
    rows = []
    for tau in (None, *TAUS):
        weights = ga.gumbel_softmax(logits, tau=tau or 1.0, hard=tau is None, seed=seed)
        rows.append(
            {
                "tau": tau,
                "mean": weights.mean(0).tolist(),
                "standard_error": (weights.std(0) / samples**0.5).tolist(),
                "samples": weights[:DRAWS_SHOWN].tolist(),
            }
        )
    return rows


def draw_relaxed(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the expectation of the samples above and single samples below it, one column per temperature."""
    figure = Figure(figsize=(11, 6), layout=ConstrainedLayoutEngine(h_pad=0.03, w_pad=0.03))
    figure.suptitle("Samples of one categorical distribution (dashes) and their expectation; a row is one noise draw")
    grid = figure.subplots(1 + DRAWS_SHOWN, len(rows), sharex=True, sharey=True)
    for column, row in enumerate(rows):
        grid[0, column].set_title("hard choice" if row["tau"] is None else f"tau = {row['tau']:g}", fontsize=10)
        for line, heights in enumerate([row["mean"], *row["samples"]]):
            _draw_bars(grid[line, column], heights, line == 0)
        grid[-1, column].set_xlabel("category", fontsize=8)
    labels = ["expectation", *(f"sample {index + 1}" for index in range(DRAWS_SHOWN))]
    for line, label in enumerate(labels):
        grid[line, 0].set_ylabel(label, fontsize=9)
    figure.savefig(path, dpi=100)


def _draw_bars(panel: Axes, heights: Sequence[float], expectation: bool) -> None:
    """One distribution over the categories; expectations also show the categorical's own probabilities as marks."""
    places = np.arange(1, len(heights) + 1)
    panel.bar(places, heights, width=0.7, color="0.75" if expectation else "0.35", edgecolor="black", linewidth=0.6)
    if expectation:
        panel.plot(
            places, CATEGORICAL, linestyle="none", marker="_", color="black", markersize=11, markeredgewidth=1.6
        )
    panel.set_ylim(0, 1.05)
    panel.set_yticks([0, 0.5, 1])
    panel.set_xticks(places)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def draw_families(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the distance between the choice probabilities and softmax against the spread of the scores."""
    figure = Figure(figsize=(6.4, 4.2), layout=ConstrainedLayoutEngine())
    panel = figure.subplots()
    fine = np.geomspace(SPREADS[0], SPREADS[-1], 25)
    for family, shift in zip(FAMILIES, (0.95, 1.0, 1.05), strict=True):  # so that no marker hides another
        style, marker = LINES[family]
        exact = [total_variation(choice_probabilities(family, s * np.array(DIRECTION)), _softmax(s)) for s in fine]
        panel.plot(fine, exact, style, color="black", linewidth=1.2)
        own = [row for row in rows if row["family"] == family]
        sampled = np.array([row["sampled"] for row in own])
        ends = np.array([row["interval"] for row in own])
        bars = np.stack([sampled - ends[:, 0], ends[:, 1] - sampled])
        places = [shift * row["spread"] for row in own]
        style_of_points = {"fmt": marker, "color": "black", "markerfacecolor": "white", "markersize": 6}
        panel.errorbar(places, sampled, yerr=bars, capsize=3, linewidth=1.0, **style_of_points)
        panel.plot([], [], style, marker=marker, color="black", markerfacecolor="white", label=family)
    panel.set_xscale("log", base=2)
    panel.set_xticks(SPREADS, [f"{s:g}" for s in SPREADS])
    panel.set_xlabel(f"spread s of the scores S = s · ({', '.join(f'{x:g}' for x in DIRECTION)})")
    panel.set_ylabel("total variation: argmax(S + noise) to softmax(S)")
    panel.legend(title="noise, variance π²/6", frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _softmax(spread: float) -> Numbers:
    return np.asarray(special.softmax(spread * np.array(DIRECTION)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Relaxed samples against tau; the choice under Gumbel, Normal and Logistic noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/noise"), help="results folder")
    parser.add_argument("--seed", type=_integer_from(0), default=0, help="of the noise")
    parser.add_argument("--samples", type=_integer_from(2), default=100_000, help="draws behind each point")
    return parser.parse_args(argv)


def _integer_from(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return value

    return integer


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws both figures, writes and returns their numbers."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    relaxed, families = relaxed_rows(args.samples, args.seed), family_rows(args.samples, args.seed)
    draw_relaxed(relaxed, args.output_dir / "relaxed_samples.png")
    draw_families(families, args.output_dir / "families.png")
    numbers = {
        "command": shlex.join(["python", "training/noise_figures.py", *argv]),
        "settings": {
            "seed": args.seed,
            "samples": args.samples,
            "categorical": CATEGORICAL,
            "direction": DIRECTION,
            "confidence": CONFIDENCE,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "gumbel_attention": ga.__version__,
        },
        "seconds": round(time.perf_counter() - start, 1),
        "relaxed": relaxed,
        "families": families,
    }
    (args.output_dir / "noise_figures.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print("total variation between argmax(S + noise) and softmax(S), the largest of the spreads")
    for family in FAMILIES:
        worst = max((row for row in families if row["family"] == family), key=lambda row: row["total_variation"])
        print(f"{family:<9} {worst['total_variation']:.2e} at spread {worst['spread']:g}")
    print(f"Figures and numbers: {args.output_dir}")
    return numbers


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    main()
