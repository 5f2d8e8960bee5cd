"""Incidents: written whole and within limits, and replayed from the folder alone to the same bits."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import incident_cases
from incident_cases import BAD_STEP, BATCH, Case, bits, make, poison, record, steps
from processes import run
from stabletrain import ConfigurationError
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.fault import Fault, NanBuffer, NanGradient, NanLoss, NoFault, Spike
from stabletrain.incident import Incident, IncidentStore, incident_folders, load_incident
from stabletrain.randomness import generators
from stabletrain.trainer import Run
from stabletrain.trainer.evaluation import evaluate
from stabletrain.trainer.replay import at_incident, incident_of, incident_of_validation, replay, sha256
from stabletrain.trainer.step import forward_backward

PRECISIONS = ("float32", "bfloat16", "float16")
CASES = [
    *(
        Case(fault, precision, accumulate)
        for fault in ("nan_input", "inf_input", "loss", "gradient", "buffer")
        for precision in PRECISIONS
        for accumulate in (1, 4)
    ),
    *(Case("spike", precision, accumulate) for precision in PRECISIONS[:2] for accumulate in (1, 4)),
    *(Case("overflow", "float16", accumulate) for accumulate in (1, 4)),
    *(Case(fault, bags=True, accumulate=4) for fault in ("nan_input", "inf_input", "gradient", "buffer")),
]
REASONS = {"nan_input": "loss", "inf_input": "loss"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[dict[str, Any], dict[str, Any]]]:
    """Each kind of incident: what was measured when it happened, and what a fresh process measured in its replay."""
    folder = tmp_path_factory.mktemp("incidents")
    found = {case: record(case, folder / str(number)) for number, case in enumerate(CASES)}
    command = [sys.executable, incident_cases.__file__, *(str(path) for path, _ in found.values())]
    done = run(command, folder)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.strip().splitlines()[-1])
    return {case: (facts, one) for (case, (_, facts)), one in zip(found.items(), again, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fresh_process_replays_to_the_same_bits(
    case: Case, recorded: dict[Case, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    before, again = recorded[case]
    assert before["step"] == BAD_STEP
    if case.precision != "float16":  # there, more than one thing overflows
        assert before["reason"] == REASONS.get(case.fault, case.fault)
    assert len(before["gradients"]) == 6
    assert {name: again[name] for name in before} == before
    assert (again["reproduces"], again["differences"]) == ("yes", [])


def everything(run: Run) -> dict[str, str]:
    """The hash of everything that a run holds, by name; also where its tensors lie."""
    found: dict[str, Any] = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    found |= dict(run.model.named_buffers())
    found |= {f"gradient.{name}": p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    for number, state in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    found |= {f"random.{number}": generator.get_state() for number, generator in enumerate(generators())}
    facts = {
        "rates": [group["lr"] for group in run.optimizer.param_groups],
        "guard": run.guard.state_dict(),
        "precision": run.precision.state_dict(),
        "progress": run.progress.state_dict(),
        "ema": None if run.ema is None else {name: sha256(t) for name, t in run.ema.average.items()},
        "modes": [module.training for module in run.model.modules()],
        "seed": run.seed,
        "threads": torch.get_num_threads(),
    }
    hashes = {name: sha256(value) for name, value in found.items() if isinstance(value, Tensor)}
    places = {f"place.{name}": str(tensor.data_ptr()) for name, tensor in run.model.named_parameters()}
    return {**hashes, **places, **{name: repr(value) for name, value in facts.items()}}


@pytest.mark.parametrize(
    "case", [Case("gradient", "float16", 4), Case("buffer"), Case("nan_input", bags=True)], ids=str
)
def test_a_replay_leaves_the_run_as_it_was(case: Case, tmp_path: Path) -> None:
    path, _ = record(case, tmp_path)
    run, undisturbed = make(case), make(case)
    for one in (run, undisturbed):
        assert steps(one, 7) is None
    run.model.eval()
    next(run.model.parameters()).grad = torch.ones_like(next(run.model.parameters()))
    before = everything(run)
    incident = load_incident(path)
    for _ in range(2):
        assert replay(run, incident).reproduces(incident) == "yes"
        assert everything(run) == before
    with at_incident(run, incident) as step:
        forward_backward(run, step)
        assert everything(run) != before
    assert everything(run) == before
    run.optimizer.zero_grad()
    for one in (run, undisturbed):
        assert steps(one, 15) is None
    after = [{k: v for k, v in everything(one).items() if not k.startswith("place")} for one in (run, undisturbed)]
    assert after[0] == after[1]


@pytest.mark.parametrize("fault", [NanLoss, NanGradient, NanBuffer, Spike])
def test_a_rehearsed_fault_happens_again_in_every_replay(fault: type[Fault], tmp_path: Path) -> None:
    run = make(Case("loss"))
    run.fault = fault(at=BAD_STEP)  # type: ignore[call-arg]
    found = steps(run, BAD_STEP + 1)
    assert found is not None
    path = IncidentStore(tmp_path).record(incident_of(run, found["step"]))
    assert path is not None
    incident = load_incident(path)
    before = run.fault.state_dict()
    for _ in range(2):
        assert replay(run, incident).reproduces(incident) == "yes"
        assert run.fault.state_dict() == before
    run.fault = NoFault()
    assert replay(run, incident).reproduces(incident) == "no"


def test_a_replay_says_what_became_of_the_fault(tmp_path: Path) -> None:
    path, _ = record(Case("nan_input"), tmp_path)
    incident, run = load_incident(path), make(Case("nan_input"))
    healthy = replace(incident, batches=[(torch.nan_to_num(inputs), targets) for inputs, targets in incident.batches])
    assert replay(run, healthy).reproduces(incident) == "no"
    assert replay(run, incident).reproduces(replace(incident, reason="gradient")) == "differs"
    assert replay(run, incident).reproduces(replace(incident, loss=1.0)) == "differs"


def test_a_replay_takes_over_threads_and_names_another_torch(tmp_path: Path) -> None:
    path, _ = record(Case("nan_input"), tmp_path)
    incident = load_incident(path)
    other = replace(incident, environment={**incident.environment, "torch": "1.0", "threads": 2})
    threads = torch.get_num_threads()
    assert replay(make(Case("nan_input")), other).differences == (f"torch was 1.0, is {torch.__version__}",)
    assert torch.get_num_threads() == threads


def test_an_incident_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _ = record(Case("nan_input"), tmp_path)
    run = make(Case("nan_input", bags=True))
    before = everything(run)
    with pytest.raises(ConfigurationError, match="another model or optimizer"):
        replay(run, load_incident(path))
    assert everything(run) == before


@pytest.mark.parametrize("averaged", [False, True])
def test_a_validation_that_is_not_finite_is_replayed(averaged: bool, tmp_path: Path) -> None:
    case = Case("nan_input")

    def run_with_average() -> Run:
        run = make(case)
        run.ema = ExponentialMovingAverage(run.model, decay=0.5) if averaged else None
        return run

    run = run_with_average()
    assert steps(run, 5) is None
    assert run.validation is not None
    batches = list(run.validation)
    batches[0].data[0][3] = torch.nan
    metrics = evaluate(run, batches)
    path = IncidentStore(tmp_path).record(incident_of_validation(run, metrics, batches, [{"index": 3, "odd": "NaN"}]))
    assert path is not None and path.name == "000000005-validation"
    incident = load_incident(path)
    other = run_with_average()
    before = everything(other)
    outcome = replay(other, incident)
    assert outcome.reason == "validation" and outcome.detail == "loss nan"
    assert outcome.reproduces(incident) == "yes"
    assert everything(other) == before
    healthy = replace(incident, batches=[(torch.nan_to_num(inputs), targets) for inputs, targets in incident.batches])
    again = replay(other, healthy)
    assert again.reproduces(incident) == "no"
    batches[0].data[0].nan_to_num_()
    assert bits(again.loss) == bits(evaluate(run, batches)["loss"])


def test_what_a_folder_says(tmp_path: Path) -> None:
    case = Case("nan_input", accumulate=4)
    run = make(case)
    bad = poison(run, case)
    found = steps(run, BAD_STEP + 1)
    assert found is not None
    incident = incident_of(run, found["step"], samples=[{"index": bad, "odd": "inputs: 1 of 5 elements NaN"}])
    path = IncidentStore(tmp_path).record(incident)
    assert path == tmp_path / "incidents" / "000000020"
    assert sorted(os.listdir(path)) == ["config.yaml", "incident.pt", "manifest.json", "state.pt", "verdict.json"]
    verdict = json.loads((path / "verdict.json").read_text())
    told = {
        name: verdict[name] for name in ("kind", "reason", "loss", "epoch", "step", "steps", "updates", "replayable")
    }
    assert told == {"kind": "rejected", "reason": "loss", "loss": "nan", "epoch": 0, "step": 20, "steps": 20,
                    "updates": 20, "replayable": True}  # fmt: skip
    assert "the loss is nan, in microbatch 0 of 4" in verdict["detail"]
    assert verdict["samples"] == [{"index": bad, "odd": "inputs: 1 of 5 elements NaN"}]
    assert [len(part) for part in verdict["indices"]] == [4, 4, 4, 4] and verdict["indices"][0][3] == bad
    statistics = verdict["statistics"]
    assert statistics["batch"]["0.0"]["nan"] == 1 and statistics["batch"]["1.0"]["nan"] == 0
    assert statistics["batch"]["0.0"]["shape"] == [4, 5] and statistics["batch"]["0.1"]["dtype"] == "int64"
    weight = run.model.state_dict()["0.weight"].double()
    assert statistics["model"]["0.weight"] == {
        "shape": [8, 5], "dtype": "float32", "nan": 0, "inf": 0, "min": float(weight.min()),
        "max": float(weight.max()), "mean": float(weight.mean()),
    }  # fmt: skip
    assert {"state.0.exp_avg", "state.5.exp_avg_sq"} <= statistics["optimizer"].keys()
    assert yaml.safe_load((path / "config.yaml").read_text()) == run.settings
    loaded = torch.load(path / "incident.pt", weights_only=True)
    assert torch.equal(loaded["batches"][0][1], found["step"].microbatches[0].data[1])


def test_the_verdict_can_be_added_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = record(Case("nan_input"), tmp_path)
    store = IncidentStore(tmp_path)
    store.amend(path, kind="salvaged", samples=[{"index": 4, "odd": "odd"}])
    incident = load_incident(path)
    assert (incident.kind, incident.samples) == ("salvaged", [{"index": 4, "odd": "odd"}])
    assert replay(make(Case("nan_input")), incident).reproduces(incident) == "yes"
    store.amend(None, kind="salvaged")
    store.amend(tmp_path / "gone", kind="salvaged")
    assert store.errors == 1 and "gone" in caplog.text


# Incidents that are no step of a run, for what the store does with them.


def incident(number: int, *, weight: Tensor | None = None, data: Any = None, updates: int | None = None) -> Incident:
    weight = torch.full((1000,), float(number)) if weight is None else weight
    data = (torch.full((4, 2), torch.nan), torch.arange(4)) if data is None else data
    return Incident(
        kind="rejected", reason="loss", detail="the loss is nan", loss=torch.nan, grad_norm=torch.nan, seed=1,
        position={"epoch": 0, "step": number, "steps": number, "updates": number if updates is None else updates,
                  "samples": 0},
        batches=[data], indices=[torch.arange(4)], precision={}, guard={}, environment={"threads": 1},
        state={"model": {"weight": weight}, "buffers": {}, "optimizer": {}},
    )  # fmt: skip


def kept(folder: Path) -> list[int]:
    return [int(path.name) for path in incident_folders(folder)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(4, [0, 1, 6, 7]), (5, [0, 1, 5, 6, 7]), (2, [0, 7]), (1, [0]), (0, []), (20, list(range(8)))],
)
def test_the_first_and_the_latest_are_kept(limit: int, expected: list[int], tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_incidents=limit)
    for number in range(8):
        path = store.record(incident(number))
        assert path is None or load_incident(path).position["steps"] == number
    assert kept(tmp_path) == expected
    assert (store.recorded, store.errors) == (8, 0)
    other = IncidentStore(tmp_path, max_incidents=limit)
    other.load_state_dict(store.state_dict())
    assert other.recorded == 8


def size(folder: Path) -> int:
    return sum(
        {stat.st_ino: stat.st_size for path in folder.rglob("*") if (stat := path.stat()) and path.is_file()}.values()
    )


def test_the_size_is_limited_and_the_first_and_the_latest_survive(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_bytes=100_000)
    for number in range(12):
        assert store.record(incident(number, weight=torch.full((4000,), float(number)))) is not None
        assert size(tmp_path) <= 100_000
    assert kept(tmp_path)[0] == 0 and kept(tmp_path)[-1] == 11
    assert 3 <= len(kept(tmp_path)) <= 6
    assert all(load_incident(path).replayable for path in incident_folders(tmp_path))


def test_a_state_that_does_not_fit_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = IncidentStore(tmp_path, max_bytes=100_000)
    path = store.record(incident(3, weight=torch.zeros(100_000)))
    assert path is not None
    assert "can't be replayed" in caplog.text and "guard.max_incident_bytes" in caplog.text
    assert json.loads((path / "verdict.json").read_text())["replayable"] is False
    loaded = load_incident(path)
    assert loaded.state is None and not loaded.replayable and loaded.indices[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigurationError, match="stored without its state or its data"):
        replay(make(Case("nan_input")), loaded)


def test_nothing_is_written_where_even_the_batch_does_not_fit(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_bytes=1000)
    assert store.record(incident(1)) is None
    assert os.listdir(tmp_path / "incidents") == []


def test_incidents_between_two_updates_share_one_state(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path)
    weight = torch.tensor([1.0, torch.nan, -0.0])
    paths = [store.record(incident(number, weight=weight.clone(), updates=7)) for number in range(3)]
    paths.append(store.record(incident(3, weight=torch.tensor([1.0, torch.nan, 0.0]), updates=7)))
    paths.append(store.record(incident(4, weight=torch.tensor([1.0, torch.nan, 0.0]), updates=8)))
    files = [path / "state.pt" for path in paths if path is not None]
    assert len({file.stat().st_ino for file in files[:3]}) == 1
    assert len({file.stat().st_ino for file in files}) == 3
    shutil.rmtree(files[0].parent)
    assert sha256(load_incident(files[2].parent).state["model"]["weight"]) == sha256(weight)  # type: ignore[index]


def test_a_run_shares_the_state_of_two_rejected_steps(tmp_path: Path) -> None:
    case = Case("nan_input")
    run = make(case)
    for place in (BAD_STEP * BATCH, (BAD_STEP + 1) * BATCH):
        run.loader.dataset.inputs[int(run.loader.order(0)[place])] = torch.nan
    store = IncidentStore(tmp_path)
    for _ in range(2):
        found = steps(run, 30)
        assert found is not None
        assert store.record(incident_of(run, found["step"])) is not None
        run.progress.step, run.progress.steps = run.progress.step + 1, run.progress.steps + 1
    paths = incident_folders(tmp_path)
    assert [path.name for path in paths] == ["000000020", "000000021"]
    assert len({(path / "state.pt").stat().st_ino for path in paths}) == 1
    for path in paths:
        assert replay(make(case), load_incident(path)).reproduces(load_incident(path)) == "yes"


def test_the_same_step_again_replaces_its_incident(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_incidents=2)
    for number in (1, 2, 1):
        assert store.record(incident(number, weight=torch.full((3,), float(store.recorded)))) is not None
    assert kept(tmp_path) == [1, 2]
    assert load_incident(tmp_path / "incidents" / "000000001").state["model"]["weight"].tolist() == [2.0] * 3  # type: ignore[index]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "incidents" / ".tmp-000000003-1").mkdir(parents=True)
    (tmp_path / "incidents" / ".del-000000002-1").mkdir()
    IncidentStore(tmp_path).record(incident(4))
    assert os.listdir(tmp_path / "incidents") == ["000000004"]


Named = namedtuple("Named", ["image", "words"])


def test_trees_of_every_kind_come_back(tmp_path: Path) -> None:
    wide = torch.arange(3_000_000.0).reshape(3, 1_000_000)
    data = {
        "named": Named(torch.ones(2, dtype=torch.bfloat16), ["a", None, 3]),
        "list": [torch.zeros(2), torch.zeros(3)],
        "pair": (wide[:, 5], torch.ones(1).expand(4)),
        "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "empty": torch.empty(0),
    }
    path = IncidentStore(tmp_path).record(incident(1, data=data))
    assert path is not None
    (found,) = load_incident(path).batches
    assert type(found["named"]).__name__ == "Named" and found["named"].words == ["a", None, 3]
    assert torch.equal(found["named"].image, data["named"].image)
    assert [len(item) for item in found["list"]] == [2, 3] and isinstance(found["pair"], tuple)
    assert torch.equal(found["pair"][0], wide[:, 5]) and found["pair"][1].stride() == (0,)
    assert found["channels last"].is_contiguous(memory_format=torch.channels_last)
    narrow = incident(2, data=torch.arange(2_000_000.0)[4:8])
    other = IncidentStore(tmp_path).record(narrow)
    assert other is not None and (other / "incident.pt").stat().st_size < 10_000


class Graph:
    """Data that is neither a tensor nor a container."""


def test_data_that_cannot_be_stored_leaves_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = IncidentStore(tmp_path).record(incident(1, data=[Graph()]))
    assert path is not None
    assert "Graph" in caplog.text and "can't be replayed" in caplog.text
    loaded = load_incident(path)
    assert loaded.batches == [None] and loaded.state is not None and not loaded.replayable
    assert json.loads((path / "verdict.json").read_text())["replayable"] is False


def test_a_disk_that_refuses_is_counted_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "incidents").write_text("a file stands where the folder should be")
    store = IncidentStore(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert store.record(incident(1)) is None
    assert (store.recorded, store.errors) == (1, 1)
    assert "incident 000000001 not written" in caplog.text


FULL = """
import resource, signal, sys
from pathlib import Path
from test_incident import IncidentStore, incident, kept
import torch
store = IncidentStore(Path(sys.argv[1]))
assert store.record(incident(1)) is not None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
assert store.record(incident(2, weight=torch.zeros(100_000))) is None
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert (store.errors, kept(Path(sys.argv[1]))) == (1, [1])
assert store.record(incident(3)) is not None
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"}
    done = run([sys.executable, "-c", FULL, str(tmp_path)], environment=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "incidents")) == ["000000001", "000000003"]


@pytest.mark.parametrize("name", ["incident.pt", "state.pt", "config.yaml", "manifest.json"])
def test_a_changed_byte_is_seen(name: str, tmp_path: Path) -> None:
    path = IncidentStore(tmp_path).record(incident(1))
    assert path is not None
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"the incident .* can't be used: {name}"):
        load_incident(path)


@pytest.mark.parametrize("name", ["incident.pt", "state.pt", "config.yaml", "manifest.json", "verdict.json"])
def test_a_missing_file_is_said(name: str, tmp_path: Path) -> None:
    path = IncidentStore(tmp_path).record(incident(1))
    assert path is not None
    (path / name).unlink()
    with pytest.raises(ConfigurationError, match=rf"can't be used: .*{name}"):
        load_incident(path)


def test_what_is_no_incident_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be used"):
        load_incident(tmp_path / "nothing")
    assert incident_folders(tmp_path / "nothing") == []


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stabletrain.incident import store as writing

    # An attacker writes hashes that fit.
    monkeypatch.setattr(writing, "plain", lambda value, name: {**value, "harm": Harmful(tmp_path / "harm")})
    path = IncidentStore(tmp_path).record(incident(1))
    assert path is not None
    with pytest.raises(ConfigurationError, match="more than tensors and plain containers"):
        load_incident(path)
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("limits", [{"max_incidents": -1}, {"max_bytes": -1}, {"max_incidents": True}])
def test_limits_are_checked(limits: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"guard\.max_incident"):
        IncidentStore(tmp_path, **limits)
