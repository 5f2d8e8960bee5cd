"""A checkpoint that an earlier version wrote: every later one loads it, or says what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from composed import checked
from golden.make_checkpoint import OVERRIDES, PLACE, write_table
from stabletrain import ConfigurationError, load_model
from stabletrain.build import build
from stabletrain.checkpoint import CheckpointStore
from stabletrain.sealed import manifest_text
from stabletrain.trainer import train
from stabletrain.trainer.resume import resume

LAST_STEP = [2, 3, 5, 9, 10, 13, 14, 17, 22, 37, 39, 41, 49, 50, 52, 55]  # its samples


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder that holds the golden checkpoint, and the table that it was trained on."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path)
    shutil.copytree(PLACE, tmp_path / "run" / "checkpoints" / "step_000000003")
    return tmp_path / "run"


def test_its_values_are_what_they_were(run_folder: Path) -> None:
    state = CheckpointStore(run_folder).latest()
    assert state is not None
    assert state["model"]["layers.5.bias"].tolist() == [-0.079648956656456, 0.0060743107460439205]
    running = [1.074605107307434, 1.20716392993927, 0.7961570620536804, 0.847601056098938]
    assert state["model"]["layers.2.running_var"].tolist() == running
    assert state["ema"]["average"]["layers.5.bias"].tolist() == [-0.08101755380630493, 0.007441181223839521]


def test_a_run_goes_on_from_it(run_folder: Path) -> None:
    run = build(checked(*OVERRIDES), run_folder)
    resume(run)
    assert run.progress.state_dict() == {"epoch": 1, "step": 0, "steps": 3, "updates": 3, "samples": 48}
    assert run.model.state_dict()["layers.5.bias"].tolist() == [-0.079648956656456, 0.0060743107460439205]
    assert run.ema is not None
    assert run.ema.average["layers.5.bias"].tolist() == [-0.08101755380630493, 0.007441181223839521]
    assert run.guard.ledger.applied == 3
    assert [sorted(indices.tolist()) for indices in run.last_good] == [LAST_STEP]
    assert run.rollback is not None
    assert run.rollback.kept() is not None
    # It knew one group of parameters; now norms and biases are one of their own.
    groups = [(len(group["params"]), group["initial_lr"]) for group in run.optimizer.param_groups]
    assert sorted(groups) == [(2, 0.01), (3, 0.01)]
    assert [float(state["step"]) for state in run.optimizer.state.values()] == [3.0] * 5
    moments = run.optimizer.state[run.model.layers[5].bias]["exp_avg"]
    assert moments.tolist() == [-0.02700752206146717, 0.02700752019882202]
    later = r"[\w.]+ \(absent\) -> \S+"  # keys of later versions
    later += r"|optimizer\.weight_decay 0\.01 -> 0\.0|schedule\._target_ \S+warmup_cosine -> \S+Cosine"  # and defaults
    only_new_keys = rf"continuing with changed settings: (({later})(; |$))+"
    assert all(re.fullmatch(only_new_keys, note) for note in run.notes)
    summary = train(run)
    assert (summary.status, summary.updates) == ("completed", 6)


def test_its_model_is_built_without_the_data(run_folder: Path) -> None:
    (run_folder.parent / "points.csv").unlink()
    model = load_model(run_folder)
    assert model.layers[5].bias.tolist() == [-0.08101755380630493, 0.007441181223839521]
    answer = model(torch.tensor([[3.0, 1.0]]))
    expected = torch.tensor([[-0.10057319700717926, -0.13327620923519135]])  # its last bits may differ elsewhere
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("version", [1, 99, None])
def test_a_version_that_is_not_known_is_refused_with_what_to_do(version: int | None, run_folder: Path) -> None:
    manifest = run_folder / "checkpoints" / "step_000000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]
    manifest.write_text(manifest_text({**content, "format": version}))
    said = rf"step_000000003 has format {version}; .* reads format 2; use the version that wrote it: .*0\.1\.0"
    with pytest.raises(ConfigurationError, match=said):
        train(build(checked(*OVERRIDES), run_folder))
    with pytest.raises(ConfigurationError, match=said):
        load_model(manifest.parent)
    assert manifest.exists()  # it isn't damaged, so it isn't set aside
