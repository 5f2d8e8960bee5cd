"""The door: commands, exit codes, and one message for whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from processes import run, started
from stabletrain.__main__ import main
from stabletrain.config import option_names

SMALL = ["experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "device=cpu"]


def command(*words, folder):
    given = [sys.executable, "-m", "stabletrain", *words]
    return run(given, folder)


def message(capsys):
    """Return the one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("stabletrain: ")
    assert "Traceback" not in error
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Poisoned(torch.nn.Module):
    """A model whose outputs are NaN."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(in_features, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) * float("nan")


# ------------------------------------------------------------------------------------------------- help and such


def test_help_imports_no_torch_and_is_of_use(tmp_path):
    code = (
        "import sys\nfrom stabletrain.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    )
    ran = run([sys.executable, "-c", code], tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    for said in (
        *(f"{group}: {', '.join(sorted(option_names(group)))}" for group in ("precision", "experiment")),
        "preset: normal, safe, stable",
        "preset=safe",
        "python -m stabletrain -m",
        "75 interrupted",
        "batch_size",
    ):
        assert said in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--cfg", "job"], ["train", "--cfg", "job"], ["--cfg", "job", "+preset=safe"]])
def test_cfg_shows_the_config_and_runs_nothing(words, capsys, tmp_path):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert ("preset: safe" if "+preset=safe" in words else "preset: normal") in shown
    assert "_target_: stabletrain.guard.Policy" in shown
    assert list(tmp_path.iterdir()) == []


def test_info_is_hydras(tmp_path):
    ran = command("--info", "searchpath", "preset=safe", folder=tmp_path)  # in a process of its own: it sets up logging
    assert ran.returncode == 0, ran.stderr
    assert "conf" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_shell_completion_is_hydras(capsys, tmp_path):
    assert main(["-sc", "install=bash"]) == 0
    assert "complete" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_completion_knows_groups_and_options(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "stabletrain precision=")
    monkeypatch.setenv("COMP_POINT", "22")
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == [f"precision={option}" for option in sorted(option_names("precision"))]


# ----------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("words", [["+preset=safe", "seed=4"], ["train", "seed=4", "preset=safe"]])
def test_a_run_in_a_folder_of_its_own(words, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main([*words, *SMALL]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tabular-safe-")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["preset"], summary["experiment"]) == ("completed", "safe", "tabular")
    assert (summary["seed"], summary["updates"]) == (4, 3)
    assert not list(tmp_path.rglob("*.log"))
    assert not list(tmp_path.rglob("multirun.yaml"))
    assert (tmp_path / "runs").parent == Path.cwd()
    assert torch.get_num_threads() == threads
    assert os.environ.get("HYDRA_FULL_ERROR") is None
    assert capsys.readouterr().err.count("stabletrain:") == 0


def test_a_name_makes_the_folder_and_the_same_command_goes_on(tmp_path, capsys):
    assert main([*SMALL, "name=mine"]) == 0
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["mine"]
    assert main([*SMALL, "name=mine", "epochs=2"]) == 0
    assert json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())["updates"] == 6
    capsys.readouterr()
    assert main([*SMALL, "name=other", "resume=must"]) == 2
    assert "resume=must" in message(capsys)


def test_somebodys_own_configs_and_code(tmp_path, capsys):
    write("myconf/model/mynet.yaml", "_target_: my_package_here.Net\nin_features: auto\nnum_classes: 2\n")
    write("myconf/data/mydata.yaml", "_target_: my_package_here.Data\n")
    write(
        "my_package_here.py",
        "import torch\n\n\nclass Net(torch.nn.Linear):\n"
        "    def __init__(self, in_features, num_classes):\n        super().__init__(in_features, num_classes)\n\n\n"
        "class Data(torch.utils.data.Dataset):\n    def __len__(self):\n        return 60\n\n"
        "    def __getitem__(self, index):\n        return torch.full((4,), float(index % 2)), index % 2\n",
    )
    words = ["model=mynet", "--config-dir", "myconf", "data=mydata", "epochs=2", "batch_size=8", "name=mine"]
    ran = command(*words, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    metrics = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())["metrics"]
    assert set(metrics["test"]) == {"loss", "accuracy"}


# ------------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "'trian' is no command; allowed: train, export, doctor. Did you mean 'train'?"),
        (["preset=saef"], "preset=saef is no option; allowed: normal, safe, stable. Did you mean 'safe'?"),
        (["precision=bf61"], "mkldnn_bf16, pure_bf16, tf32. Did you mean 'bf16'?"),
        (["gaurd=skip"], "unknown key 'gaurd'. Did you mean 'guard'?"),
        (["gaurd.window=1"], "unknown key 'gaurd.window'. Did you mean 'guard.window'?"),
        (["guard.windo=1"], "unknown key 'guard.windo'. Did you mean 'guard.window'?"),
        (
            ["+guard.windo=1"],
            "'guard.windo': stabletrain.guard.Policy doesn't take it. Did you mean 'window'?",
        ),
        (["++gaurd.window=1"], "unknown key 'gaurd': nothing reads it. Did you mean 'guard'?"),
        (["batchsize=3"], "unknown key 'batchsize'. Did you mean 'batch_size'?"),
        (["+preset=safe", "preset=stable"], "preset is given 2 times (+preset=safe preset=stable); give it once."),
        (["preset=null"], "'preset=null' leaves preset without an option; allowed: normal, safe, stable."),
        (["clipping=null"], "Write clipping=none to go without."),
        (["seed=[1"], "'seed=[1' can't be read"),
        (["batch_size=0"], "batch_size=0 is not allowed; batch_size is a whole number, 1 or more."),
        (["base_lr=nan"], "base_lr=nan is not allowed"),
        (["warmup_epochs=7"], "the warm-up takes 7"),
        (["name=${nothing}"], "Interpolation key 'nothing' not found"),
        (["+other=${nothing}"], "Interpolation key 'nothing' not found"),
        (["--config-dir", "nowhere"], "nowhere' not found"),
        (["--config-name", "nowhere"], "there is no config 'nowhere'"),
        (["model._target_=no_such_package.Net"], "there is no module 'no_such_package'"),
        (
            [
                "optimizer._target_=torch.optim.AdamW",
                "~optimizer.no_decay",
                "~optimizer.groups",
                "~optimizer.fused",
                "optimizer.betas=[2,3]",
            ],
            "Invalid beta",
        ),
        (["data=csv", "data.path=missing.csv", "data.target=kind"], "missing.csv"),
        (["model=1e3"], "put it into quotes"),
        (["device=cuda:99"], "cuda:99"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last=0"),
        (["tracking.progress=foo"], "tracking.progress='foo'"),
        (["resume=must"], "resume=must, but"),
    ],
)
def test_bad_configuration_is_code_2_and_one_message_and_leaves_nothing(words, said, tmp_path, capsys):
    keys = {word.partition("=")[0] for word in words}
    small = [word for word in SMALL if word.partition("=")[0] not in keys]
    assert main(words if words == ["trian"] else [*small, *words]) == 2
    assert said in message(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_is_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--presets"])
    assert ended.value.code == 2
    assert "--presets" in capsys.readouterr().err


def test_an_error_in_somebodys_code_is_code_1_with_its_place(tmp_path, capsys):
    write(
        "breaks_in_forward.py",
        "import torch\n\n\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n        1 / 0\n",
    )
    write("mine/model/breaks.yaml", "_target_: breaks_in_forward.Net\nin_features: auto\nout_features: 2\n")
    assert main(["--config-dir", "mine", *SMALL, "model=breaks", "name=a"]) == 1
    said = message(capsys)
    assert "ZeroDivisionError: division by zero" in said
    assert f"({tmp_path / 'breaks_in_forward.py'}:6); debug=true shows the traceback" in said
    assert main(["--config-dir", "mine", *SMALL, "model=breaks", "name=b", "debug=true"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert error.rstrip().splitlines()[-1].startswith("stabletrain: ZeroDivisionError")


def test_an_error_while_somebodys_model_is_built_is_code_1_and_leaves_nothing(tmp_path, capsys):
    write("breaks_at_once.py", "def net():\n    raise ValueError('odd')\n")
    write("mine/model/breaks.yaml", "_target_: breaks_at_once.net\n")
    assert main(["--config-dir", "mine", *SMALL, "model=breaks"]) == 1
    said = message(capsys)
    assert "model (breaks_at_once.net): ValueError: odd" in said
    assert "breaks_at_once.py:2)" in said
    assert not (tmp_path / "runs").exists()


def test_unstable_training_is_code_3(tmp_path, capsys):
    write("mine/model/poisoned.yaml", "_target_: test_main.Poisoned\nin_features: auto\n")
    assert main(["--config-dir", "mine", *SMALL, "model=poisoned", "guard=raise", "name=a", "doctor.time_limit=0"]) == 3
    said = message(capsys)
    assert "epoch 0, step 0" in said
    assert json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())["status"] == "stopped_unstable"


def test_a_signal_is_code_75_and_the_same_command_continues(tmp_path):
    words = ["experiment=tabular", "epochs=100000", "name=long", "device=cpu"]
    begun = tmp_path / "runs" / "long" / "history.csv"
    given = [sys.executable, "-m", "stabletrain", *words]
    with started(given, tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (begun.is_file() and len(begun.read_text().splitlines()) > 1):
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "SIGTERM" in error
    assert error.count("stabletrain:") == 1
    summary = json.loads((begun.parent / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    epochs = len(begun.read_text().splitlines()) + 2
    ran = command(*words[:1], f"epochs={epochs}", *words[2:], folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((begun.parent / "summary.json").read_text())["updates"] > summary["updates"]


def test_a_folder_that_can_not_be_made_is_code_2(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file, where the folder should be")
    assert main(SMALL) == 2
    assert "can't write" in message(capsys)
    assert (tmp_path / "runs").read_text() == "a file, where the folder should be"
