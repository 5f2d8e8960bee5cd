"""The contract of every option: it composes, builds, trains 3 updates, and its state makes a round trip."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from composed import checked
from stabletrain import config
from stabletrain.build import build
from stabletrain.state import Stateful
from stabletrain.trainer import train
from stabletrain.tree import tensors

SMALL = ("experiment=tabular", "batch_size=128", "epochs=1", "seed=3", "base_lr=1e-3", "device=cpu")  # 3 steps
ROWS = 60  # of the tables written below: 42 of them to train on

FEW_TEXTS = ("data.samples=60", "batch_size=14")


def own(kind: str, *more: str) -> Sequence[str]:
    """What a loss needs whose samples are of another kind than a class."""
    samples = ("data=dataset", "data.dataset._target_=composed.Samples", f"+data.dataset.kind={kind}", "batch_size=14")
    return (*samples, *more)


BINARY = ("task=binary", "model.num_classes=1")
REGRESSION = own("points", "task=regression", "model.num_classes=1")
PLACES = own(
    "places", "task=segmentation", "model._target_=composed.Pixels", "model.in_features=1", "model.num_classes=2"
)
VIEWS = own("views", "task=supervised", "model._target_=composed.EachStep", "model.num_classes=4")
REGIMES = ("data.rows=880", "data.in_features=5", "data.sequence=20", "batch_size=13")
TASTES = ("data.users=20", "data.items=30", "data.choices=6")
GRAPH = ("task=recommendation", "loss=bpr", "model.dimension=8")
FEW_EMBEDDINGS = ("data.neighbours=5", "batch_size=419", "model.heads=2")
CLUSTERING = ("data=digit_embeddings", "model=clustering", "loss=temi_heads", "task=clustering", *FEW_EMBEDDINGS)
STORIES = ("data.users=20", "data.items=60", "data.topics=6", "data.validation=0.4", "data.test=0.4", "batch_size=10")

# What an option needs besides itself.
NEEDS: dict[tuple[str, str], Sequence[str]] = {
    ("model", "convnet"): ("data=digits", "batch_size=419"),
    ("data", "digits"): ("model=convnet", "batch_size=419"),
    ("model", "recurrent"): ("data=sequences", "data.samples=60", "batch_size=14"),
    ("data", "sequences"): ("model=recurrent", "data.samples=60", "batch_size=14"),
    ("augmentation", "cutmix"): ("data=digits", "model=convnet", "batch_size=419"),
    ("augmentation", "random_crop_flip"): ("data=digits", "model=convnet", "batch_size=419"),
    ("augmentation", "jitter"): ("data=sequences", "model=recurrent", "data.samples=60", "batch_size=14"),
    ("model", "transformer"): ("data=text", "task=next_token", *FEW_TEXTS),
    ("data", "text"): ("model=transformer", "task=next_token", *FEW_TEXTS),
    ("task", "next_token"): ("data=text", "model=transformer", *FEW_TEXTS),
    ("initialisation", "scaled_residual"): ("data=text", "model=transformer", "task=next_token", *FEW_TEXTS),
    ("experiment", "text"): FEW_TEXTS,
    ("data", "csv"): ("data.path=table.csv", "data.target=kind", "batch_size=14"),
    ("data", "npz"): ("data.path=table.npz", "batch_size=14"),
    ("data", "parquet"): ("data.path=table.parquet", "data.target=kind", "batch_size=14"),
    ("data", "dataset"): ("data.dataset._target_=composed.Points", "+data.dataset.count=60", "batch_size=14"),
    ("model", "bags"): ("data=digit_bags", "data.bags=60", "batch_size=14"),
    ("data", "digit_bags"): ("model=bags", "data.bags=60", "batch_size=14"),
    ("data", "bag_table"): (
        *("data.path=bags.csv", "data.target=kind"),
        *("model=bags", "batch_size=14"),
    ),
    ("experiment", "bags"): ("data.bags=60", "batch_size=14"),
    ("model", "direction"): (*REGIMES, "data=regimes"),
    ("data", "regimes"): (*REGIMES, "model=direction"),
    ("data", "windows"): (
        *("model=direction", "data.path=table.csv", "data.target=a", "data.exclude=[kind]", "data.horizon=1"),
        *("data.sequence=4", "batch_size=12"),
    ),
    ("experiment", "direction"): (*REGIMES, "augmentation=none"),
    ("model", "clustering"): CLUSTERING[:1] + CLUSTERING[2:],
    ("data", "digit_embeddings"): CLUSTERING[1:],
    ("data", "embeddings"): (
        *("data.path=table.npz", "data.x=x", "data.y=kind", *CLUSTERING[1:4]),
        *("data.neighbours=5", "batch_size=14", "data.clusters=2"),
    ),
    ("loss", "temi_heads"): CLUSTERING[:2] + CLUSTERING[3:],
    ("task", "clustering"): CLUSTERING[:3] + CLUSTERING[4:],
    ("experiment", "clustering"): FEW_EMBEDDINGS,
    ("model", "semantic"): (*STORIES, "data=stories", "task=next_item"),
    ("data", "stories"): (*STORIES, "model=semantic", "task=next_item"),
    ("task", "next_item"): (*STORIES, "data=stories", "model=semantic"),
    ("data", "item_sequences"): (
        *("data.path=reads.csv", "model=semantic", "task=next_item", "batch_size=10", "data.text_features=4"),
    ),
    ("experiment", "semantic_recommendation"): STORIES,
    ("experiment", "digits"): ("batch_size=419",),
    ("model", "mmgcn"): ("data=tastes", *TASTES, *GRAPH, "batch_size=24"),
    ("data", "tastes"): ("model=mmgcn", *TASTES, *GRAPH, "batch_size=24"),
    ("task", "recommendation"): ("data=tastes", "model=mmgcn", *TASTES, *GRAPH, "batch_size=24"),
    ("data", "interactions"): (
        *("data.path=chosen.inter", "+data.features.visual=looks.npy", "data.timestamp=timestamp"),
        *("model=mmgcn", *GRAPH, "batch_size=12"),
    ),
    ("experiment", "recommendation"): (*TASTES, "model.dimension=8", "batch_size=24"),
    ("loss", "bce"): BINARY,
    ("loss", "binary_focal"): BINARY,
    ("loss", "dice"): PLACES,
    ("loss", "mse"): REGRESSION,
    ("loss", "huber"): REGRESSION,
    ("loss", "gaussian_nll"): (*REGRESSION[:-1], "model.num_classes=2"),
    ("loss", "bpr"): ("task=supervised",),
    ("loss", "info_nce"): (*VIEWS, "loss.learnable=true"),
    ("loss", "supervised_contrastive"): VIEWS,
    ("loss", "ctc"): own("steps", "task=supervised", "model._target_=composed.EachStep", "model.num_classes=4"),
    ("loss", "temi"): (*VIEWS, "model._target_=composed.Clusters", "loss.num_classes=3", "loss.heads=2"),
    ("task", "binary"): (*BINARY, "loss=bce"),
    ("task", "regression"): (*REGRESSION, "loss=mse"),
    ("task", "segmentation"): (*PLACES, "loss=cross_entropy"),
    ("task", "supervised"): ("loss=kl",),
    ("experiment", "sequences"): ("data.samples=60", "batch_size=14"),
}
OPTIONS = [
    (group, option)
    for group in (*config.group_names(), "preset", "experiment")
    for option in config.option_names(group)
]


def overrides(group: str, option: str) -> list[str]:
    small = [word for word in SMALL if not (group == "experiment" and word.startswith("experiment="))]
    needs = NEEDS.get((group, option), ())
    replaced = {word.partition("=")[0] for word in needs}
    return [*(word for word in small if word.partition("=")[0] not in replaced), f"{group}={option}", *needs]


def write_tables() -> None:
    generator = np.random.default_rng(0)
    kind = np.arange(ROWS) % 2
    features = generator.normal(size=(ROWS, 3)) + kind[:, None]
    np.savez("table.npz", x=features.astype(np.float32), y=kind)
    names = ["a", "b", "c"]
    rows = [
        ",".join([*(f"{value:.6f}" for value in row), str(label)]) for row, label in zip(features, kind, strict=True)
    ]
    with open("table.csv", "w") as file:
        file.write("\n".join([",".join([*names, "kind"]), *rows]) + "\n")
    with open("bags.csv", "w") as file:
        file.write("\n".join([",".join([*names, "kind", "bag"]), *(f"{row},{n}" for n, row in enumerate(rows))]) + "\n")
    np.save("looks.npy", features[: ROWS // 4])
    with open("chosen.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        file.writelines(f"{n % 12}\t{n % (ROWS // 4)}\t{n}\n" for n in range(ROWS))
    with open("reads.csv", "w") as file:
        rows = [f"u{row // 6},i{row % 7},the word{row % 7}" for row in range(ROWS)]  # 3 of each user to train on
        file.write("\n".join(["user,item,text", *rows]) + "\n")
    import pyarrow
    from pyarrow import parquet

    columns = {name: features[:, column] for column, name in enumerate(names)}
    parquet.write_table(pyarrow.table({**columns, "kind": kind}), "table.parquet")


def stateful_parts(run) -> dict[str, Stateful]:
    parts = {"model": run.model, "optimizer": run.optimizer, "ema": run.ema, "precision": run.precision}
    parts |= {"loss": run.objective, "guard": run.guard, "progress": run.progress, "totals": run.totals}
    parts |= {"schedule": run.schedule} if isinstance(run.schedule, Stateful) else {}
    return {name: part for name, part in parts.items() if part is not None}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_there_are_options():
    groups = [group for group, _ in OPTIONS]
    assert len(OPTIONS) >= 45
    assert min(groups.count(group) for group in set(groups)) >= 1
    assert set(groups) == {*config.group_names(), "preset", "experiment"}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}-{option}" for group, option in OPTIONS])
def test_an_option_composes_builds_trains_and_makes_a_round_trip(group, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tables()
    given = overrides(group, option)

    run = build(checked(*given), tmp_path / "run", given)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    summary = train(run)

    assert (summary.status, summary.updates, summary.rejected) == ("completed", 3, 0)
    assert summary.finite == {"parameters": True, "buffers": True, "optimizer": True}
    assert not all(map(torch.equal, before, run.model.parameters()))
    assert (tmp_path / "run" / "summary.json").is_file()

    parts = stateful_parts(run)
    saved = {name: part.state_dict() for name, part in parts.items()}
    assert len(list(tensors(saved))) >= len(before)
    stored = io.BytesIO()
    torch.save(saved, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    fresh = stateful_parts(build(checked(*given), tmp_path / "other", given))
    assert list(fresh) == list(parts)
    assert not same(fresh["model"].state_dict(), saved["model"])
    for name, part in fresh.items():
        part.load_state_dict(loaded[name])
        assert same(part.state_dict(), saved[name]), name


@pytest.mark.parametrize("group", sorted({group for group, _ in OPTIONS} - {"preset", "checkpoint", "tracking"}))
@pytest.mark.parametrize("preset", ["stable", "safe"])  # above it is `normal`
def test_each_option_trains_under_each_preset(group, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tables()
    for option in config.option_names(group):
        words = ["tracking=none", "checkpoint=none", f"preset={preset}", *overrides(group, option)]
        summary = train(build(checked(*words), tmp_path / option))
        assert (summary.status, summary.updates, summary.rejected) == ("completed", 3, 0), option
        assert all(summary.finite.values()), option
