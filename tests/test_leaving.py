"""What leaves a run: exported files, and models ready for inference."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from composed import checked
from stabletrain import ConfigurationError, load_model
from stabletrain.__main__ import main
from stabletrain.assembly import assemble
from stabletrain.build import build
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.export import export
from stabletrain.optimizer import adamw
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.weights import read_weights

SMALL = ("experiment=tabular", "batch_size=128", "tracking=none", "device=cpu", "optimizer.lr=0.01")


class Own(nn.Module):
    """A model as somebody would write it, with a tied weight and a buffer that isn't contiguous."""

    turns: Tensor

    def __init__(self, in_features: int = 6, num_classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(in_features, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.back = nn.Linear(8, in_features, bias=False)
        self.again = nn.Linear(in_features, 8, bias=False)
        self.again.weight = self.embed.weight
        self.head = nn.Linear(8, num_classes)
        self.register_buffer("turns", torch.eye(8, 8)[:, torch.arange(7, -1, -1)].t())

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.embed(inputs)) @ self.turns
        scores: Tensor = self.head(torch.relu(self.again(self.back(hidden))))
        return scores


def points(count: int = 96) -> ArrayDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 3
    return ArrayDataset(torch.randn(count, 6, generator=generator) + targets[:, None], targets)


def python_run(folder: Path, *, ema: bool = True, **options: Any) -> Run:
    """A trained run whose model was built by hand."""
    torch.manual_seed(0)
    options = {"epochs": 2, "batch_size": 32, "tracking": partial(Tracker, progress="none"), **options}
    if ema:
        options["ema"] = partial(ExponentialMovingAverage, decay=0.9)
    run = assemble(Own(), Splits(train=points(), validation=points(30)), folder=folder, **options)
    train(run)
    return run


def outputs(run: Run, inputs: Tensor) -> Tensor:
    """What the trained model answers, with its averaged weights."""
    run.model.eval()
    assert run.ema is not None
    with torch.no_grad(), run.ema.applied(run.model):
        answers: Tensor = run.model(inputs)
    return answers


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_model_of_ones_own_comes_back_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"{i % 7},{i % 5},{'ab'[i % 7 > 3]}" for i in range(300)]
    table = tmp_path / "mine.csv"
    table.write_text("\n".join(["height,weight,kind", *rows]) + "\n")
    options = ["model._target_=test_leaving.Own", "~model.hidden", "~model.batch_norm", "~model.dropout", "ema=ema"]
    run = build(checked(*SMALL, "data=csv", f"data.path={table}", "data.target=kind", *options, "epochs=3"), tmp_path)
    train(run)
    table.unlink()
    inputs = torch.randn(5, 2)
    said = export(tmp_path, checkpoint="last", to=tmp_path / "out")
    assert "the averaged weights (EMA) of" in said
    assert "written once: again.weight = embed.weight" in said
    for folder, checkpoint in ((tmp_path, "last"), (tmp_path / "out", "best")):
        model = load_model(folder, checkpoint)
        assert type(model).__name__ == "Own"
        assert not model.training
        assert model.again.weight is model.embed.weight
        assert torch.equal(model(inputs), outputs(run, inputs))
        assert torch.equal(model.norm.running_var, run.model.norm.running_var)
        assert int(model.norm.num_batches_tracked) > 0


def test_best_last_and_by_name(tmp_path: Path) -> None:
    worst = partial(CheckpointStore, mode="max")  # the loss falls, so that the first is its "best"
    python_run(tmp_path, epochs=4, checkpoint=worst, ema=False, optimizer=partial(adamw, lr=1e-2))
    noted = json.loads((tmp_path / "checkpoints" / "best.json").read_text())["checkpoint"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert noted != names[-1]
    assert read_weights(tmp_path).origin.name == noted
    assert read_weights(tmp_path, "last").origin.name == names[-1]
    assert read_weights(tmp_path, names[1]).origin.name == names[1]
    assert read_weights(tmp_path / "checkpoints" / names[1]).origin.name == names[1]
    model = load_model(tmp_path, names[0], model=Own())
    state = torch.load(tmp_path / "checkpoints" / names[0] / "state.pt", weights_only=True)
    assert torch.equal(model.head.weight, state["model"]["head.weight"])
    with pytest.raises(ConfigurationError, match=rf"checkpoint=step_1 is not there; allowed: best, last, {names[0]}"):
        load_model(tmp_path, "step_1")


def test_the_file_is_read_by_others(tmp_path: Path) -> None:
    run = python_run(tmp_path)
    export(tmp_path, checkpoint="last")
    file = tmp_path / "exported" / "model.safetensors"
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.yaml", "manifest.json", file.name]
    assert file.stat().st_mode & 0o777 == (file.parent / "config.yaml").stat().st_mode & 0o777
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert "again.weight" not in opened.keys()  # noqa: SIM118 (it is no dictionary)
    assert metadata["again.weight"] == "embed.weight"
    assert metadata["averaged"] == "True"
    other = Own()
    safetensors.torch.load_model(other, file)
    other.eval()
    assert run.ema is not None
    assert torch.equal(other.turns, run.model.turns)
    assert torch.equal(other.again.weight, run.ema.average["embed.weight"])
    ours = load_model(tmp_path / "exported", model=Own())
    assert torch.equal(ours(points().inputs), other(points().inputs))
    alone = load_model(file, model=Own())
    assert torch.equal(alone(points().inputs), other(points().inputs))


def test_without_an_average_it_is_the_weights_themselves(tmp_path: Path) -> None:
    run = python_run(tmp_path, ema=False)
    assert "the weights of" in export(tmp_path, checkpoint="last")
    model = load_model(tmp_path / "exported", model=Own())
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_run_from_python_says_what_it_needs(tmp_path: Path) -> None:
    python_run(tmp_path)
    with pytest.raises(ConfigurationError, match=r"doesn't say how its model is built.*model=\.\.\.\)"):
        load_model(tmp_path)
    with pytest.raises(ConfigurationError, match=r"head.weight is \(3, 8\), in the model \(4, 8\)"):
        load_model(tmp_path, model=Own(num_classes=4))


@pytest.mark.parametrize("place", [0, 8, 300, -1])
def test_a_flipped_bit_is_found(place: int, tmp_path: Path) -> None:
    python_run(tmp_path)
    export(tmp_path)
    flip(tmp_path / "exported" / "model.safetensors", place)
    with pytest.raises(ConfigurationError, match=r"model.safetensors is not what was written.*export it again"):
        load_model(tmp_path / "exported", model=Own())
    for state in tmp_path.glob("checkpoints/step_*/state.pt"):
        flip(state, place)
    with pytest.raises(ConfigurationError, match=r"state.pt is not what was written.*give another one"):
        export(tmp_path)


def test_a_torn_file_without_a_manifest_is_found(tmp_path: Path) -> None:
    python_run(tmp_path)
    export(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes((tmp_path / "exported" / file.name).read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match=r"model.safetensors can't be used: .*; export it again"):
        load_model(file, model=Own())


def test_an_export_of_another_format_is_refused(tmp_path: Path) -> None:
    python_run(tmp_path)
    export(tmp_path)
    from stabletrain.sealed import manifest_text

    manifest = tmp_path / "exported" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]
    manifest.write_text(manifest_text({**content, "format": 99}))
    with pytest.raises(ConfigurationError, match=r"has format 99.*use the version that wrote it"):
        load_model(tmp_path / "exported", model=Own())


def call(place: str) -> nn.Module:
    Path(place).touch()
    return nn.Identity()


def test_with_a_model_given_nothing_that_the_folder_names_is_called(tmp_path: Path) -> None:
    python_run(tmp_path)
    export(tmp_path)
    config = tmp_path / "exported" / "config.yaml"
    called = tmp_path / "called"
    config.write_text(f"seed: 0\nmodel: {{_target_: test_leaving.call, place: {called}}}\n")
    load_model(tmp_path / "exported", model=Own())
    assert not called.exists()
    with pytest.raises(ConfigurationError, match="don't fit the model"):
        load_model(tmp_path / "exported")
    assert called.exists()
    config.write_text("seed: 0\nmodel: {_target_: no_such_package.Net}\n")
    with pytest.raises(ConfigurationError, match="there is no module 'no_such_package'"):
        load_model(tmp_path / "exported")


def test_where_an_export_goes(tmp_path: Path) -> None:
    python_run(tmp_path / "run")
    export(tmp_path / "run", to=tmp_path / "deep" / "out")
    last = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    export(last, to=tmp_path / "deep" / "out")  # an earlier export is replaced
    assert json.loads((tmp_path / "deep" / "out" / "manifest.json").read_text())["checkpoint"] == last.name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(ConfigurationError, match=r"run holds something else .*; give to=<new folder>"):
        export(tmp_path / "run", to=tmp_path / "run")
    with pytest.raises(ConfigurationError, match="give to=<folder> too"):
        export(tmp_path / "deep" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="can't be written"):
        export(tmp_path / "run", to=tmp_path / "file" / "out")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "epochs=1", "name=mine"]) == 0
    capsys.readouterr()
    assert main(["export", "run=runs/mine", "checkpoint=last", "to=out"]) == 0
    assert capsys.readouterr().out.startswith(
        "out/model.safetensors: the weights of runs/mine/checkpoints/step_000000003"
    )
    assert torch.equal(load_model("out").layers[1].weight, load_model("runs/mine").layers[1].weight)
    assert main(["export", "--help"]) == 0
    assert "usage: python -m stabletrain export run=<folder>" in capsys.readouterr().out
    for words, said in (
        (["run=nowhere"], "nowhere is no run's folder with checkpoints"),
        (["run=nowhere", "to=out"], "nowhere doesn't exist"),
        (["rum=runs/mine"], "'rum=runs/mine' can't be used here. Did you mean 'run'? Usage: python -m stabletrain ex"),
        (["runs/mine"], "Usage: python -m stabletrain export run=<folder> [checkpoint=best|last|<name>] [to=<folder>]"),
        (["run="], "'run=' can't be used here"),
        (["to=a"], "run is missing"),
        (["run=a", "run=b"], "run is given twice"),
        (["run=runs/mine", "checkpoint=bets"], "checkpoint=bets is not there; allowed: best, last, step_"),
    ):
        assert main(["export", *words]) == 2
        assert said in capsys.readouterr().err
