"""The experiment `bags`: its presets, baselines, rehearsals, and the loop people write, on the same bags.

    python benchmarks/bags.py [--seeds 0 1 2] [--out docs/experiments/bags.json] [--plot docs/experiments/bags.png]

Each run is a process of its own, with all its memory. Attention is measured on the positive bags of the test part: how
often the instance with the most attention is the digit, and the AUC of the attention of all their instances.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BAD = ["fault.at=10", "fault.times=2"]  # each of these two steps has 4 bags: 8 of 700 are bad from then on
OVERFLOW = ["fault.module=score", "fault.factor=1e9", "fault.at=200", "fault.times=20", "precision=fp16"]
RUNS: dict[str, list[str]] = {
    "normal": ["preset=normal"],
    "stable": ["preset=stable"],
    "safe": ["preset=safe"],
    "stable, 8 bags NaN": ["preset=stable", "fault=nan_input", "fault.samples=4", *BAD],
    "stable, 8 bags with a NaN instance": ["preset=stable", "fault=nan_part", "fault.samples=4", *BAD],
    "stable, 8 bags empty": ["preset=stable", "fault=empty_input", "fault.samples=4", *BAD],
    "stable, scores overflow, clamp": ["preset=stable", "fault=large_output", *OVERFLOW],
    "stable, scores overflow, no clamp": ["preset=stable", "fault=large_output", "model.clamp=null", *OVERFLOW],
}
BY_HAND = ["by hand", "by hand, 8 bags NaN", "by hand, 8 bags with a NaN instance", "by hand, 8 bags empty"]
BASELINES = ["mean", "max"]


def attention(model: Any, part: Any) -> dict[str, float]:
    """How well the attention finds the digit in positive bags."""
    import torch
    from sklearn.metrics import roc_auc_score

    with torch.no_grad():
        weights = model.eval().attention(part.inputs)
    positive = [place for place, target in enumerate(part.targets.tolist()) if target == 1]
    is_digit = [part.digits[place] == 9 for place in positive]
    found = [bool(digit[int(weights[place].argmax())]) for place, digit in zip(positive, is_digit, strict=True)]
    scores = torch.cat([weights[place] for place in positive])
    area = float(roc_auc_score(torch.cat(is_digit), scores)) if bool(scores.isfinite().all()) else math.nan
    return {
        "finds": sum(found) / len(found),
        "attention_auc": area,
        "by_chance": statistics.mean(float(digit.float().mean()) for digit in is_digit),
    }


def one(overrides: list[str]) -> dict[str, Any]:
    """Train one run in this process."""
    from hydra import compose, initialize_config_dir

    from stabletrain.build import build
    from stabletrain.config import conf_folder, settings
    from stabletrain.data import digit_bags
    from stabletrain.trainer import train

    given = ["experiment=bags", "tracking.progress=none", "tracking.tensorboard=false", *overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        config = settings(compose("config", overrides=given))
    with tempfile.TemporaryDirectory() as folder:
        run = build(config, folder, given)
        summary = train(run)
    bad = sorted(getattr(run.fault, "indices", []))
    return {
        **summary.metrics["test"],
        **attention(run.model, digit_bags(seed=config["seed"]).test),
        "status": summary.status,
        "finite": all(summary.finite.values()),
        "rejected": summary.rejected,
        "salvaged": summary.salvaged,
        "bad": len(bad),
        "named": len(set(bad) & set(summary.quarantined)),
        "named_wrongly": len(set(summary.quarantined) - set(bad)),
        "seconds": summary.seconds,
    }


def by_hand(name: str, seed: int, epochs: int = 30) -> dict[str, Any]:
    """The loop people write, `if isnan: continue`, with a softmax that knows no empty bag."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from stabletrain.data import Loader, OrderedLoader, digit_bags
    from stabletrain.loss import CrossEntropy
    from stabletrain.model import BagClassifier
    from stabletrain.task import RankedClassification

    class Naive(BagClassifier):
        def forward(self, bags: Any) -> torch.Tensor:
            mean = []
            for encoded in self.encoder(torch.cat(list(bags))).split([len(bag) for bag in bags]):
                scores = self.score(torch.tanh(self.content(encoded)) * torch.sigmoid(self.gate(encoded)))
                mean.append((scores.exp() * encoded).sum(0) / scores.exp().sum())
            return self.classifier(self.dropout(torch.stack(mean)))

    data = digit_bags(seed=seed)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    for place in order[:8].tolist():
        bag = data.train.inputs[place].clone()
        if "empty" in name:
            bag = bag[:0]
        elif "instance" in name:
            bag[0] = math.nan
        elif "NaN" in name:
            bag[:] = math.nan
        data.train.inputs[place] = bag
    torch.manual_seed(seed)
    model = Naive(64, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    loader, skipped, start = Loader(data.train, batch_size=4, seed=seed), 0, time.perf_counter()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for [microbatch] in loader.epoch(epoch):
            inputs, targets = microbatch.data
            loss = F.cross_entropy(model(inputs), targets, label_smoothing=0.1)
            optimizer.zero_grad()
            if torch.isnan(loss):
                skipped += 1
                continue
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    metrics = RankedClassification(CrossEntropy()).evaluate(model, OrderedLoader(data.test, batch_size=32))
    finite = all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    return {**metrics, **attention(model, data.test), "finite": finite, "rejected": skipped, "seconds": seconds}


def baseline(pooling: str, seed: int) -> dict[str, Any]:
    """Logistic regression on each bag's mean or largest features."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from stabletrain.data import digit_bags

    data = digit_bags(seed=seed)
    pooled = [np.stack([getattr(bag.numpy(), pooling)(0) for bag in part.inputs]) for part in (data.train, data.test)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(pooled[0], data.train.targets)
    scores = model.decision_function(pooled[1])
    return {
        "auc": float(roc_auc_score(data.test.targets, scores)),
        "accuracy": float(model.score(pooled[1], data.test.targets)),
    }


def child(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Measure one row's seed in this process."""
    if name in BASELINES:
        return baseline(name, seed)
    if name in BY_HAND:
        return by_hand(name, seed)
    return one([*RUNS[name], f"seed={seed}", *overrides])


def shown(values: list[float], digits: int = 3) -> str:
    """Return median (least to most), NaN where one is."""
    if any(math.isnan(value) for value in values):
        return f"NaN in {sum(math.isnan(value) for value in values)} of {len(values)}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of what was measured, in Markdown."""
    lines = [
        "| run | test AUC | test accuracy | attention finds the 9 | attention's AUC | rejected | salvaged |"
        " culprits named | finite |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in found.items():
        cells = [shown([row["auc"] for row in rows]), shown([row["accuracy"] for row in rows])]
        for key in ("finds", "attention_auc"):
            cells.append(shown([row[key] for row in rows]) if key in rows[0] else "")
        for key in ("rejected", "salvaged"):
            cells.append(", ".join(str(row[key]) for row in rows) if key in rows[0] else "")
        cells.append(", ".join(f"{row['named']} of {row['bad']}" for row in rows) if rows[0].get("bad") else "")
        cells.append(("yes" if all(row["finite"] for row in rows) else "no") if "finite" in rows[0] else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Draw the test AUC of every run and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.35 * len(found) + 1.2))
    for line, (name, rows) in enumerate(reversed(found.items())):
        values = [row["auc"] for row in rows if not math.isnan(row["auc"])]
        axes.plot(values, [line] * len(values), "o", color="tab:green" if name in RUNS else "tab:gray", alpha=0.7)
        if len(values) < len(rows):
            axes.text(0.5, line, f"NaN in {len(rows) - len(values)} of {len(rows)}", color="tab:red", va="center")
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.set_xlabel("test AUC, one point for each seed")
    axes.set_xlim(0.48, 1.01)
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure every row with every seed, one process after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=[*BASELINES, *RUNS, *BY_HAND])
    parser.add_argument("--out", default="bags.json", help="results, to which those of this call are added")
    parser.add_argument("--plot", default=None)
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), default=None, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.one is not None:
        result = child(arguments.one[0], int(arguments.one[1]), overrides)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        print(json.dumps({**result, "seed": int(arguments.one[1]), "memory_mb": memory}))
        return
    out = Path(arguments.out)
    known: dict[str, list[dict[str, Any]]] = json.loads(out.read_text()) if out.exists() else {}
    for seed in arguments.seeds:
        for name in arguments.rows:
            command = [sys.executable, __file__, "--one", name, str(seed), *overrides]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            known[name] = [old for old in known.get(name, []) if old["seed"] != seed] + [row]
            print(name, json.dumps(row), flush=True)
            out.write_text(json.dumps(known, indent=1) + "\n")
    found = {name: known[name] for name in (*BASELINES, *RUNS, *BY_HAND) if name in known}
    print(table(found))
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
