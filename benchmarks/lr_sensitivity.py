"""How much the learning rate matters: a small transformer at seven rates, bare and with each switch.

    python benchmarks/lr_sensitivity.py run [--seeds 0 1 2] [--variants bare ...] [--results lr_sensitivity.jsonl]
    python benchmarks/lr_sensitivity.py report [--results lr_sensitivity.jsonl] [--plot lr_sensitivity.png]

`run` appends one line of JSON for each finished run and passes over those that are there, so that it can be stopped and
started at will. `report` prints the table and draws the plot of docs/lr_sensitivity.md.

What is computed, for each seed and variant, from the validation losses L(eta) at the rates eta (Wortsman et al. 2023,
"Small-scale proxies for large-scale Transformer training instabilities", section 2.1): with l0 the loss before
training, l(eta) = min(L(eta), l0) (l0 where L isn't finite), l* the smallest l(eta) and eta* where it is,

    sensitivity            mean over all rates of l(eta) - l*, theirs
    one-sided sensitivity  the same mean over the rates from eta* (included) up: what too high a rate costs
    from 1e-2 up           the same over the rates from 1e-2 up: says something also where eta* is the largest
    usable range           log10 of the ratio of the largest to the smallest rate, going from eta* in both directions
                           without a gap, whose l(eta) is at most 1.1 l*; decades, in steps of the grid

The rates are spaced evenly on a log scale, so that the means stand for an integral over log(eta). Losses are cross
entropies without smoothing, whatever the variant trains with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from stabletrain import UnstableTraining
from stabletrain.build import build
from stabletrain.config import conf_folder, settings
from stabletrain.loss import CrossEntropy
from stabletrain.task import NextToken
from stabletrain.trainer import evaluate, train

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
NEAR = 1.1  # a loss at most this times the best is usable

# 4,800 sequences of 32 tokens, each seen once, in 300 steps of 16. The period is different in each sequence, so that a
# model has to look for what came before, not just 16 places back.
COMMON = (
    *("experiment=text", "data.samples=5120", "data.validation=0.0625", "data.test=0", "epochs=1", "batch_size=16"),
    *("data.min_period=12", "data.max_period=20", "validate_from=299", "optimizer.betas=[0.9,0.95]"),
    *("tracking=none", "checkpoint=none", "log_every=1000000", "device=cpu"),
)
BARE = ("precision=fp32", "clipping=none", "guard=none", "warmup_epochs=0.05")
CLIP = ("clipping=norm", "clipping.max_norm=1.0")
Z_LOSS = ("loss=z_loss",)
SANDWICH = ("model.norm=sandwich", "model.embedding_norm=true", "model.norm_gain=false")
QK, HEAD, WARMUP = "model.qk_norm=true", "model.head_norm=true", "warmup_epochs=0.25"
VARIANTS: dict[str, tuple[str, ...]] = {
    "bare": BARE,
    "clip 1.0": (*BARE, *CLIP),
    "warm-up 25 %": (*BARE, WARMUP),
    "z-loss": (*BARE, *Z_LOSS),
    "qk-norm": (*BARE, QK),
    "score clamp 10": (*BARE, "model.score_clamp=10"),
    "logit soft cap 30": (*BARE, "model.logit_soft_cap=30"),
    "head norm": (*BARE, HEAD),
    "no norm gains": (*BARE, "model.norm_gain=false"),
    "post-norm": (*BARE, "model.norm=post"),
    "sandwich norm": (*BARE, "model.norm=sandwich"),
    "scaled residual init": (*BARE, "initialisation=scaled_residual"),
    "qk-norm, z-loss, warm-up 25 %, clip": (*BARE, *CLIP, *Z_LOSS, QK, WARMUP),
    "all norms": (*BARE, *SANDWICH, QK, HEAD),
    "all norms, warm-up 25 %": (*BARE, *SANDWICH, QK, HEAD, WARMUP),
    # What a preset chooses, at the same rates: its factor on the rate undone.
    "preset normal": ("preset=normal", "lr_scale=1"),
    "preset stable": ("preset=stable", "lr_scale=1"),
    "preset safe": ("preset=safe", "lr_scale=1"),
}
DRAWN = ("bare", "clip 1.0", "qk-norm", "sandwich norm", "qk-norm, z-loss, warm-up 25 %, clip", "preset safe",
         "all norms", "all norms, warm-up 25 %")  # fmt: skip


def overrides(variant: str, rate: float, seed: int) -> list[str]:
    """Return what one run is given; the weight decay doesn't depend on the rate (it is "independent", 1e-4)."""
    decay = f"optimizer.weight_decay={1e-4 / rate:.6g}"
    return [*COMMON, *VARIANTS[variant], decay, f"base_lr={rate:g}", f"seed={seed}"]


def trained(given: Sequence[str]) -> dict[str, Any]:
    """Train one run; return its validation losses before and after, and how it ended."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())), tempfile.TemporaryDirectory() as at:
        run = build(settings(compose("config", overrides=list(given))), Path(at, "run"))
        plain = NextToken(CrossEntropy())
        learnt_by, run.task = run.task, plain
        assert run.validation is not None
        first = evaluate(run, run.validation)["loss"]
        run.task = learnt_by
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train(run)
            ended = "completed"
        except UnstableTraining:
            ended = "stopped"
        run.task = plain
        last = evaluate(run, run.validation)
        return {"first": first, **last, "ended": ended, "rejected": run.guard.ledger.rejected}


def run_all(results: Path, variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Do the runs that the results don't hold yet, seed by seed, so that a table can be made of the first ones."""
    done = {(tuple(one["overrides"])) for one in read(results)}
    for seed in seeds:
        for variant in variants:
            for rate in RATES:
                given = overrides(variant, rate, seed)
                if tuple(given) in done:
                    continue
                one = {"variant": variant, "rate": rate, "seed": seed, **trained(given), "overrides": given}
                with results.open("a") as file:
                    file.write(json.dumps(one) + "\n")
                print(f"{variant:40s} seed {seed} rate {rate:<6g} loss {one['loss']:.3f} {one['ended']}", flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    """Return what was written so far; a last line that was cut short isn't there."""
    lines = results.read_text().splitlines(keepends=True) if results.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curves(results: Path) -> dict[str, list[list[float]]]:
    """Return l(eta) of each variant, for each seed of which all rates are there."""
    found: dict[tuple[str, int], dict[float, float]] = {}
    for one in read(results):
        # What the program no longer does doesn't count.
        if one["variant"] in VARIANTS and one["overrides"] == overrides(one["variant"], one["rate"], one["seed"]):
            bounded = min(one["loss"], one["first"]) if math.isfinite(one["loss"]) else one["first"]
            found.setdefault((one["variant"], one["seed"]), {})[one["rate"]] = bounded
    whole = {key: [losses[rate] for rate in RATES] for key, losses in found.items() if set(losses) == set(RATES)}
    return {
        variant: [losses for (name, _), losses in whole.items() if name == variant]
        for variant in VARIANTS
        if any(name == variant for name, _ in whole)
    }


def sensitivity(losses: Sequence[float]) -> float:
    """Return the mean of l(eta) - l*, from losses in the order of the rates."""
    return statistics.fmean(losses) - min(losses)


def one_sided(losses: Sequence[float]) -> float:
    """Return the same mean over the rates from the best one up."""
    return sensitivity(losses[losses.index(min(losses)) :])


def from_high(losses: Sequence[float]) -> float:
    """Return the mean of l(eta) - l* over the rates from 1e-2 up."""
    return statistics.fmean(losses[RATES.index(1e-2) :]) - min(losses)


def usable(losses: Sequence[float]) -> float:
    """Return the range of rates around the best one with losses near the best, decades."""
    least = most = losses.index(min(losses))
    while least > 0 and losses[least - 1] <= NEAR * min(losses):
        least -= 1
    while most < len(losses) - 1 and losses[most + 1] <= NEAR * min(losses):
        most += 1
    return math.log10(RATES[most] / RATES[least])


def report(results: Path, plot: Path | None) -> None:
    """Print the table in Markdown and draw the plot."""
    found = curves(results)
    print("| variant | seeds | sensitivity | one-sided | from 1e-2 up | usable range, decades | best |", end="")
    print("".join(f" {rate:.0e} |".replace("e-0", "e-") for rate in RATES))
    print("| --- |" + " ---: |" * (6 + len(RATES)))
    for variant, seeds in found.items():
        row = [spread([of(losses) for losses in seeds]) for of in (sensitivity, one_sided, from_high)]
        row += [f"{statistics.fmean(map(usable, seeds)):.1f}", f"{statistics.fmean(map(min, seeds)):.2f}"]
        row += [f"{mean:.2f}" for mean in means(seeds)]
        print(f"| {variant} | {len(seeds)} | " + " | ".join(row) + " |")
    if plot is not None:
        draw(found, plot)


def spread(values: Sequence[float]) -> str:
    """Return the mean with the least and the most."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def means(seeds: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over the seeds at each rate."""
    return [statistics.fmean(column) for column in zip(*seeds, strict=True)]


def draw(found: dict[str, list[list[float]]], plot: Path) -> None:
    """Draw validation loss over learning rate, one line a variant, with the spread of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for variant in (name for name in DRAWN if name in found):
        columns = list(zip(*found[variant], strict=True))
        (line,) = axes.plot(RATES, means(found[variant]), marker="o", markersize=3, label=variant)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(RATES, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss after 300 steps, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(plot, dpi=150)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--results", type=Path, default=Path("lr_sensitivity.jsonl"))
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    if arguments.what == "run":
        run_all(arguments.results, arguments.variants, arguments.seeds)
    else:
        report(arguments.results, arguments.plot)


if __name__ == "__main__":
    main()
