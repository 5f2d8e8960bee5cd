"""What is measured of each experiment: its metrics, its baselines, what people write instead, and its rehearsals."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Numbers = dict[str, float]


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


def boosted_statistics(splits: Any, seed: int) -> Numbers:
    """Gradient boosting on mean, deviation, last value and slope of each column in a window."""
    import torch
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    def table(part: Any) -> tuple[Any, Any]:
        windows, targets = part.gather(torch.arange(len(part)))
        time_axis = torch.linspace(-1, 1, windows.shape[1]).view(1, -1, 1)
        columns = [windows.mean(1), windows.std(1), windows[:, -1], (windows * time_axis).mean(1)]
        return torch.cat(columns, 1).numpy(), targets.numpy()

    model = HistGradientBoostingClassifier(max_iter=100, class_weight="balanced", random_state=seed)
    model.fit(*table(splits.train))
    features, real = table(splits.test)
    answers = model.predict(features)
    return {
        "macro_f1": float(f1_score(real, answers, average="macro")),
        "balanced_accuracy": float(balanced_accuracy_score(real, answers)),
        "accuracy": float(accuracy_score(real, answers)),
    }


def pooled_regression(pooling: str) -> Callable[[Any, int], Numbers]:
    """Logistic regression on each bag's mean or largest features."""

    def fitted(splits: Any, seed: int) -> Numbers:
        import numpy as np
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        parts = (splits.train, splits.test)
        pooled = [np.stack([getattr(bag.numpy(), pooling)(0) for bag in part.inputs]) for part in parts]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, random_state=seed))
        model.fit(pooled[0], splits.train.targets)
        return {
            "auc": float(roc_auc_score(splits.test.targets, model.decision_function(pooled[1]))),
            "accuracy": float(model.score(pooled[1], splits.test.targets)),
        }

    return fitted


def found_by_attention(model: Any, splits: Any) -> Numbers:
    """How often the most attended instance of a bag with the digit is the digit, and how often any instance is."""
    import torch

    part = splits.test
    with torch.no_grad():
        weights = model.eval().attention(part.inputs)
    positive = [place for place, target in enumerate(part.targets.tolist()) if target == 1]
    is_digit = [part.digits[place] == 9 for place in positive]
    found = [bool(digit[int(weights[place].argmax())]) for place, digit in zip(positive, is_digit, strict=True)]
    return {
        "finds_the_digit": sum(found) / len(found),
        "by_chance": statistics.mean(float(digit.float().mean()) for digit in is_digit),
    }


def plain_softmax(model: Any) -> Any:
    """Attention with the softmax as its formula says it, which knows no empty bag and no large score."""
    import torch

    class Naive(type(model)):  # type: ignore[misc]
        def forward(self, bags: Any) -> torch.Tensor:
            mean = []
            for encoded in self.encoder(torch.cat(list(bags))).split([len(bag) for bag in bags]):
                scores = self.score(torch.tanh(self.content(encoded)) * torch.sigmoid(self.gate(encoded)))
                mean.append((scores.exp() * encoded).sum(0) / scores.exp().sum())
            return self.classifier(self.dropout(torch.stack(mean)))

    model.__class__ = Naive
    return model


# 1 % of the 2,984 training windows of `direction`, and of the 700 training bags of `bags`.
BAD_WINDOWS = ("fault.at=0", "fault.times=3", "fault.samples=10")
BAD_BAGS = ("fault.at=10", "fault.times=2", "fault.samples=4")

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
}
