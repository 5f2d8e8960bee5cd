"""What is measured of each experiment: its metrics, its baselines, what people write instead, and its rehearsals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiment_baselines import (
    Numbers,
    after_the_last,
    boosted_statistics,
    factorised,
    found_by_attention,
    k_means,
    most_chosen,
    plain_softmax,
    pooled_regression,
    popularity,
)


@dataclass(frozen=True)
class Rehearsal:
    """A failure made on purpose, under the preset stable.

    Args:
        overrides: on the command line.
        naive: whether the loop written by hand meets it too.
        bad: whether there are bad samples, all of which are to be named.
    """

    overrides: tuple[str, ...]
    naive: bool = True
    bad: bool = False


@dataclass(frozen=True)
class Experiment:
    """What is measured of an experiment.

    Args:
        metrics: of the test part, the larger the better; the first one decides.
        baselines: by name; each makes such metrics of the data's parts and a seed.
        measure: further metrics of a trained model and the data's parts.
        naive: the model as people write it, with the weights of ours.
        chance: name of the test metric that a constant answer reaches, or None.
        rehearsals: by name.
    """

    metrics: tuple[str, ...]
    baselines: dict[str, Callable[[Any, int], Numbers]] = field(default_factory=dict)
    measure: Callable[[Any, Any], Numbers] | None = None
    naive: Callable[[Any], Any] | None = None
    chance: str | None = None
    rehearsals: dict[str, Rehearsal] = field(default_factory=dict)


# 1 % of the training samples: 2,993 windows of `direction`, 700 bags of `bags`, 1,259 of `clustering`, about 2,500
# histories of `semantic_recommendation`.
BAD_WINDOWS = ("fault.at=0", "fault.times=3", "fault.samples=10")
BAD_BAGS = ("fault.at=10", "fault.times=2", "fault.samples=4")

ONE_HEAD = ("+fault=large_output", "fault.at=300", "fault.times=100", "fault.module=student.heads.3")

EXPERIMENTS = {
    "direction": Experiment(
        metrics=("macro_f1", "balanced_accuracy"),
        baselines={"gradient boosting": boosted_statistics},
        chance="majority_accuracy",
        rehearsals={
            "1 % NaN windows": Rehearsal(("+fault=nan_input", *BAD_WINDOWS), bad=True),
            "fp16 without a fault": Rehearsal(("precision=fp16", "accumulate=2"), naive=False),
            "fp16 overflow": Rehearsal(
                ("+fault=fp16_overflow", "fault.at=50", "fault.times=3", "precision=fp16", "accumulate=2"), naive=False
            ),
            "NaN loss": Rehearsal(("+fault=nan_loss", "fault.at=0", "fault.times=5")),
        },
    ),
    "bags": Experiment(
        metrics=("auc", "accuracy", "finds_the_digit"),
        baselines={
            "logistic regression on means": pooled_regression("mean"),
            "logistic regression on maxima": pooled_regression("max"),
        },
        measure=found_by_attention,
        naive=plain_softmax,
        rehearsals={
            "1 % NaN bags": Rehearsal(("+fault=nan_input", *BAD_BAGS), bad=True),
            "1 % bags with a NaN instance": Rehearsal(("+fault=nan_part", *BAD_BAGS), bad=True),
            "1 % empty bags": Rehearsal(("+fault=empty_input", *BAD_BAGS)),
            "scores overflow in fp16": Rehearsal(
                (
                    *("+fault=large_output", "fault.module=score", "fault.factor=1e9", "fault.at=200"),
                    *("fault.times=20", "precision=fp16"),
                ),
                naive=False,
            ),
            "scores overflow in fp16, no clamp": Rehearsal(
                (
                    *("+fault=large_output", "fault.module=score", "fault.factor=1e9", "fault.at=200"),
                    *("fault.times=20", "precision=fp16", "model.clamp=null"),
                ),
                naive=False,
            ),
        },
    ),
    "recommendation": Experiment(
        metrics=("recall_at_20", "ndcg_at_20", "cold_recall_at_20"),
        baselines={"popularity": popularity, "matrix factorisation": factorised},
        rehearsals={
            "1 % NaN interactions": Rehearsal(
                ("+fault=nan_input", "fault.at=0", "fault.times=3", "fault.samples=38"), bad=True
            ),
            "exploding messages in fp16": Rehearsal(
                (
                    *("+fault=large_output", "fault.at=50", "fault.times=3", "precision=fp16"),
                    "fault.module=modalities.visual.combined.1",
                ),
                naive=False,
            ),
            "fp16 overflow": Rehearsal(
                ("+fault=fp16_overflow", "fault.at=50", "fault.times=3", "precision=fp16"), naive=False
            ),
            "NaN loss": Rehearsal(("+fault=nan_loss", "fault.at=0", "fault.times=5")),
        },
    ),
    "clustering": Experiment(
        metrics=("nmi", "ari", "hungarian_accuracy"),
        baselines={"k-means": k_means},
        rehearsals={
            "1 % NaN samples": Rehearsal(("+fault=nan_input", "fault.at=0", "fault.samples=13"), bad=True),
            "NaN weight in a head": Rehearsal(("+fault=nan_weight", "fault.at=300"), naive=False),
            "a head's logits too large": Rehearsal(ONE_HEAD, naive=False),
            "a head's logits overflow in fp16": Rehearsal((*ONE_HEAD, "precision=fp16"), naive=False),
        },
    ),
    "semantic_recommendation": Experiment(
        metrics=("hit_rate_at_10", "mrr", "cold_hit_rate_at_10"),
        baselines={"popularity": most_chosen, "last-item co-occurrence": after_the_last},
        rehearsals={
            "1 % NaN texts": Rehearsal(("+fault=nan_input", "fault.at=0", "fault.times=25"), bad=True),
            "1 % empty histories": Rehearsal(("+fault=empty_input", "fault.at=0", "fault.times=25")),
            "projection overflows in fp16": Rehearsal(
                (
                    *("+fault=large_output", "fault.at=50", "fault.times=3"),
                    *("fault.module=text_projection", "precision=fp16"),
                ),
                naive=False,
            ),
        },
    ),
}
