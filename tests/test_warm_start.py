"""Starting from weights of elsewhere: `init_from`."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stabletrain import ConfigurationError, Policy
from stabletrain.__main__ import main
from stabletrain.assembly import assemble, fit
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.export import export
from stabletrain.optimizer import adamw
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.weights import Weights, put_weights

AVERAGE = partial(ExponentialMovingAverage, decay=0.9)
SMALL = ["experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "device=cpu"]


def points() -> ArrayDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(96) % 3
    return ArrayDataset(torch.randn(96, 5, generator=generator) + targets[:, None], targets)


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def make(folder: Path | None, model: nn.Module | None = None, **options: Any) -> Run:
    options = {"epochs": 2, "batch_size": 16, "tracking": partial(Tracker, progress="none"), **options}
    options.setdefault("optimizer", partial(adamw, lr=1e-2))
    splits = Splits(train=points(), validation=points())
    return assemble(model if model is not None else network(), splits, folder=folder, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with an average of its weights, and its export."""
    folder = tmp_path_factory.mktemp("source")
    train(make(folder / "run", ema=AVERAGE))
    export(folder / "run", checkpoint="last", to=folder / "out")
    return folder


def last(source: Path) -> Path:
    return max((source / "run" / "checkpoints").glob("step_*"))


def expected(source: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(last(source) / "state.pt", weights_only=True)
    return {**state["model"], **state["ema"]["average"]}


@pytest.mark.parametrize("place", ["checkpoint", "export", "file"])
def test_the_averaged_weights_are_taken_before_anything_else_looks(place: str, source: Path, tmp_path: Path) -> None:
    places = {"checkpoint": last(source), "export": source / "out", "file": source / "out" / "model.safetensors"}
    run = make(tmp_path, network(seed=1), init_from=places[place], ema=AVERAGE)
    for name, tensor in expected(source).items():
        assert torch.equal(run.model.state_dict()[name], tensor), name
    assert run.ema is not None
    for name, tensor in run.ema.average.items():
        assert torch.equal(tensor, expected(source)[name]), name
    assert (run.progress.updates, run.ema.updates, len(run.optimizer.state)) == (0, 0, 0)
    [note] = run.notes
    assert note.startswith(f"init_from: all 9 tensors of the model are the averaged weights (EMA) of {places[place]}")
    summary = train(run)
    assert (summary.status, summary.updates) == ("completed", 12)


def test_a_run_gives_its_best_and_fit_takes_it_too(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network(seed=1)
    fit(
        model,
        Splits(train=points()),
        epochs=1,
        lr=0.0,
        tracking=partial(Tracker, progress="none"),
        init_from=source / "run",
    )
    assert "init_from: all 9 tensors of the model are the averaged weights (EMA) of" in caplog.text
    assert torch.equal(model[3].weight, expected(source)["3.weight"])  # its last checkpoint is its best


def test_what_does_not_fit_is_refused_and_listed(source: Path, tmp_path: Path) -> None:
    other = nn.Sequential(*network(width=8), nn.Linear(3, 4))
    other[3] = nn.Linear(8, 3, bias=False)
    other[1] = nn.BatchNorm1d(8, affine=False)
    other[0] = nn.Linear(4, 8)
    said = re.escape("missing (the model has them, the weights don't): 4.weight; 4.bias") + r"\n"
    said += r".*unexpected .*: 1.bias; 1.weight; 3.bias\n"
    said += r".*of another shape: 0.weight is \(8, 5\), in the model \(8, 4\)\n"
    with pytest.raises(ConfigurationError, match=rf"init_from=.*don't fit the model:\n  {said}Take what fits with"):
        make(tmp_path / "run", other, init_from=source / "out")
    assert not (tmp_path / "run").exists()
    before = other[0].weight.clone()
    run = make(tmp_path / "run", other, init_from=source / "out", init_strict=False)
    assert "init_from: 5 of 8 tensors of the model are the averaged weights" in run.notes[0]
    assert "of another shape: 0.weight is (8, 5), in the model (8, 4)" in run.notes[0]
    assert torch.equal(other[0].weight, before)
    assert torch.equal(other[3].weight, expected(source)["3.weight"])


def test_nothing_that_fits_is_always_refused(source: Path) -> None:
    with pytest.raises(ConfigurationError, match="don't fit the model"):
        make(None, nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), init_from=source / "out", init_strict=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_is_refused_by_name(value: float, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "out" / "model.safetensors")
    tensors["1.running_var"] = tensors["1.running_var"].double().index_fill(0, torch.tensor([2]), value)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigurationError, match=r"bad.safetensors aren't finite: 1.running_var\. Take an earlier"):
        make(None, init_from=tmp_path / "bad.safetensors", init_strict=False)


class Masked(nn.Module):
    """A model with infinities that belong there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))


def test_a_mask_may_hold_infinities(tmp_path: Path) -> None:
    save_file(Masked().state_dict(), tmp_path / "masked.safetensors")
    run = make(None, Masked(), init_from=tmp_path / "masked.safetensors")
    assert "all 3 tensors" in run.notes[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wraps_a_model_is_no_difference(prefix: str, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "out" / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "wrapped.safetensors")
    run = make(None, network(seed=1), init_from=tmp_path / "wrapped.safetensors")
    assert torch.equal(run.model.state_dict()["0.weight"], expected(source)["0.weight"])
    run = make(None, nn.ModuleDict({"module": network(seed=1)}), init_from=source / "out")
    assert torch.equal(run.model.state_dict()["module.0.weight"], expected(source)["0.weight"])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "nowhere doesn't exist"),
        ("empty", "empty is neither a run's folder with checkpoints, a checkpoint's folder, an exported folder or a"),
        ("weights.pt", "weights.pt is neither a run's folder"),
        ("torn.safetensors", "torn.safetensors can't be used"),
    ],
)
def test_what_can_not_be_read(place: str, said: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pt").write_bytes(b"abc")
    (tmp_path / "torn.safetensors").write_bytes((source / "out" / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ConfigurationError, match=said):
        make(None, init_from=tmp_path / place)


@given(data=st.data())
def test_every_name_is_accounted_for(data: st.DataObject) -> None:
    """Whatever was dropped, added or reshaped is named, and exactly the rest is taken."""
    model, source = network(seed=1), network(seed=2).state_dict()
    names = sorted(source)
    dropped = data.draw(st.sets(st.sampled_from(names)))
    added = data.draw(st.sets(st.sampled_from(["0.more", "9.weight", "weight"])))
    reshaped = data.draw(st.sets(st.sampled_from(names))) - dropped
    tensors = {name: tensor for name, tensor in source.items() if name not in dropped}
    tensors |= {name: torch.zeros(2) for name in added} | {name: torch.zeros(2, 2, 2) for name in reshaped}
    weights = Weights(tensors=tensors, origin=Path("source"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fits = set(names) - dropped - reshaped
    try:
        said = put_weights(model, weights, strict=len(fits) < 3)
    except ConfigurationError as error:
        said = str(error)
        fits = set()
        assert dropped | added | reshaped
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name] if name in fits else before[name])
    for what, which in (("missing", dropped), ("unexpected", added), ("of another shape", reshaped)):
        lines = [line.partition("): " if what != "of another shape" else ": ")[2] for line in said.splitlines()
                 if line.startswith(f"  {what}")]  # fmt: skip
        assert {entry.split(" is ")[0] for line in lines for entry in line.split("; ")} == which


def test_a_run_that_goes_on_does_not_read_it_again(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(source / "out", tmp_path / "weights")
    undisturbed = make(tmp_path / "undisturbed", network(seed=1), init_from=tmp_path / "weights", epochs=3, ema=AVERAGE)
    train(undisturbed)
    stopped = make(tmp_path / "stopped", network(seed=1), init_from=tmp_path / "weights", epochs=3, ema=AVERAGE)
    stopped.epochs = 2  # as if it had been killed in the third
    train(stopped)
    shutil.rmtree(tmp_path / "weights")
    caplog.clear()
    resumed = make(tmp_path / "stopped", network(seed=1), init_from=tmp_path / "weights", epochs=3, ema=AVERAGE)
    train(resumed)
    assert f"init_from={tmp_path / 'weights'} isn't read, because the run goes on from a checkpoint" in caplog.text
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    with pytest.raises(ConfigurationError, match="doesn't exist"):
        make(tmp_path / "stopped", init_from=tmp_path / "weights", resume="never")


def test_the_guard_sees_what_was_loaded(source: Path, tmp_path: Path) -> None:
    """A rejected first step goes back to the loaded weights, not to the random ones."""
    data = points()
    data.inputs[:] = float("nan")
    model = network(seed=1)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "tracking": partial(Tracker, progress="none")}
    train(assemble(model, Splits(train=data), guard=Policy(max_rejected=50), init_from=source / "out", **options))
    for name, tensor in expected(source).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "name=first"]) == 0
    capsys.readouterr()
    assert main([*SMALL, "name=second", "init_from=runs/first", "model.hidden=[8]"]) == 2
    assert "of another shape: layers.1.weight is (64, 30), in the model (8, 30)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    words = ["init_from=runs/first/checkpoints/step_000000003", "model.hidden=[64,8]", "init_strict=false"]
    assert main([*SMALL, "name=second", *words]) == 0
    assert main([*SMALL, "name=third", "init_from=3"]) == 2
    assert main([*SMALL, "name=third", "init_strict=perhaps"]) == 2
    assert "init_strict is true or false" in capsys.readouterr().err
