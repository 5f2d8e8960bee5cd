"""Building: from settings to parts, and what is said when the code behind an option can't be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import stabletrain
from composed import checked
from stabletrain.build import PartFailed, build
from stabletrain.data import ArrayDataset, Splits
from stabletrain.errors import ConfigurationError
from stabletrain.trainer import train

SMALL = ("experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "checkpoint=none", "device=cpu")


def raises_value_error() -> None:
    raise ValueError("odd")


def raises_configuration_error() -> None:
    raise ConfigurationError("give an even number")


def not_a_model() -> list[int]:
    return [1]


class Wide(torch.nn.Module):
    """A model that records what it was given."""

    def __init__(self, in_features: int, num_classes: int, more: dict, shape: list) -> None:
        super().__init__()
        self.given = {"in_features": in_features, "num_classes": num_classes, "more": more, "shape": shape}
        self.layer = torch.nn.Linear(in_features, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def test_instantiate_has_one_call_site():
    found = []
    for file in Path(stabletrain.__file__).parent.rglob("*.py"):
        found += [file.name] * len(re.findall(r"\binstantiate\(", file.read_text()))
    assert found == ["build.py"]


def test_auto_is_taken_from_the_data_and_everything_is_plain(tmp_path):
    options = ["model._target_=test_build.Wide", "~model.hidden", "~model.batch_norm", "~model.dropout"]
    run = build(checked(*SMALL, *options, "+model.more={num_classes:auto,a:[1]}", "+model.shape=[1,2]"), tmp_path)
    assert run.model.given == {
        "in_features": 30,
        "num_classes": 2,
        "more": {"num_classes": 2, "a": [1]},
        "shape": [1, 2],
    }
    assert type(run.model.given["more"]) is dict
    assert type(run.model.given["shape"]) is list


def test_auto_that_the_data_does_not_tell_names_what_it_does(tmp_path):
    with pytest.raises(
        ConfigurationError,
        match=r"model\.in_channels is auto, but the data \(.*\) doesn't tell in_channels; it tells .*in_features=30.*"
        r"Give it as model\.in_channels=<value>",
    ):
        build(checked(*SMALL, "model=convnet"), tmp_path)


def test_a_bare_data_set_is_divided_by_the_seed(tmp_path):
    def run_with(seed, name):
        keys = ["dataset", "validation", "test", "seed"]
        bare = ["data=dataset", "data._target_=composed.Points", *(f"~data.{key}" for key in keys), "+data.count=60"]
        return build(checked(*SMALL, *bare, "batch_size=14", f"seed={seed}"), tmp_path / name)

    def validation_inputs(run):
        return torch.cat([batch.data[0] for batch in run.validation])

    run, again, other = run_with(0, "a"), run_with(0, "b"), run_with(1, "c")
    assert len(validation_inputs(run)) == 8  # 4 of the 30 samples of each class
    assert torch.equal(validation_inputs(run), validation_inputs(again))
    assert not torch.equal(validation_inputs(run), validation_inputs(other))
    assert train(run).status == "completed"


def test_the_weights_are_a_function_of_the_seed(tmp_path):
    def weights(seed, name):
        torch.manual_seed(ord(name))  # whatever was drawn before doesn't matter
        run = build(checked(*SMALL, f"seed={seed}"), tmp_path / name)
        return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])

    first, again, other = weights(0, "a"), weights(0, "b"), weights(1, "c")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_building_leaves_the_generators_alone(tmp_path):
    before = torch.random.get_rng_state()
    build(checked(*SMALL), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            ["model._target_=test_build.not_a_model"],
            ConfigurationError,
            r"model: .* built a list; .* torch\.nn\.Module",
        ),
        (["model._target_=test_build.raises_configuration_error"], ConfigurationError, "^give an even number$"),
        (["model._target_=test_build.raises_value_error"], PartFailed, r"^model \(test_build\..*\): ValueError: odd$"),
        (["model.hidden=[a]"], PartFailed, r"^model \(stabletrain\.model\.MLP\): TypeError: "),
        (["clipping.max_norm=-1"], ConfigurationError, r"clipping\.max_norm is -1"),
        (
            [
                "optimizer._target_=torch.optim.AdamW",
                "~optimizer.no_decay",
                "~optimizer.groups",
                "optimizer.betas=[2,3]",
            ],
            PartFailed,
            r"^optimizer \(torch.*beta",
        ),
        (["warmup_epochs=5"], ConfigurationError, "the warm-up takes 5 epochs"),
        (["schedule.warmup_updates=3"], ConfigurationError, "the warm-up takes 3 updates"),
    ],
)
def test_an_error_says_which_group_and_target_it_comes_from(options, error, message, tmp_path):
    if "_target_=test_build" in options[0]:
        options = [
            *options,
            *(f"~model.{key}" for key in ("in_features", "num_classes", "hidden", "batch_norm", "dropout")),
        ]
    with pytest.raises(error, match=message) as caught:
        build(checked(*SMALL, *options), tmp_path / "run")
    assert "Hydra" not in str(caught.value)
    assert "full_key" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_partial_is_held_against_what_it_will_be_called_with(tmp_path):
    values = checked(*SMALL)
    values["schedule"] = {**values["schedule"], "stray": 1}  # past the checks of the config, as a caller from Python is
    with pytest.raises(ConfigurationError, match=r"schedule: stabletrain\.schedule\.Cosine can't be called"):
        build(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_needs_no_partial_in_its_config(tmp_path):
    values = checked(*SMALL)
    values["optimizer"] = {"_target_": "torch.optim.Adagrad", "lr": 0.5}
    assert isinstance(build(values, tmp_path).optimizer, torch.optim.Adagrad)


@pytest.mark.parametrize(("mode", "gamma"), [("as_is", 2.0), ("smoothed", 1.0), ("plain", None)])
def test_the_loss_is_simplified_as_far_as_the_preset_says(mode, gamma, tmp_path):
    loss = build(checked(*SMALL, "loss=focal", f"loss_mode={mode}"), tmp_path).task.loss
    assert getattr(loss, "gamma", None) == gamma


def test_settings_and_overrides_are_kept_for_the_records(tmp_path):
    values = checked(*SMALL)
    run = build(values, tmp_path, ["a=1"])
    assert values["model"]["in_features"] == "auto"
    facts = {"in_features": 30, "num_classes": 2}  # so that the model can be built again without the data
    assert run.settings == {**values, "model": {**values["model"], **facts}}
    assert run.overrides == ["a=1"]


class Graph(torch.nn.Module):
    """A model with a place for two of the data's tables."""

    def __init__(self, edges: int = 3, *, trained: bool = False, **options: object) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(2, edges, dtype=torch.int64))
        self.features = torch.nn.Parameter(torch.zeros(4, 2), requires_grad=trained)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def with_tables(**options: object) -> Splits:
    inputs = torch.randn(40, 2)
    tables = {"edges": torch.arange(6).view(2, 3), "features": torch.arange(8.0).view(4, 2), "unknown": torch.ones(1)}
    return Splits(ArrayDataset(inputs, (inputs[:, 0] > 0).long()), tables=tables)


def tables_run(folder: Path, *more: str):
    words = ("data._target_=test_build.with_tables", "model._target_=test_build.Graph", "batch_size=10", "ema=ema")
    return build(checked(*SMALL[:2], *SMALL[3:], *words, *more), folder)


def test_the_datas_tables_reach_the_model_and_stay_what_they_are(tmp_path):
    run = tables_run(tmp_path, "initialisation=xavier", "+model.edges=3")
    assert train(run).status == "completed"
    tables = with_tables().tables
    assert torch.equal(run.model.edges, tables["edges"])
    assert torch.equal(run.model.features, tables["features"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+model.edges=2", r"table edges has the shape \[2, 3\], but the model has \[2, 2\]"),
        ("+model.trained=true", "the model trains its own parameter features"),
    ],
)
def test_a_table_that_has_no_right_place_is_refused(option, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        tables_run(tmp_path, option)


def test_tables_are_part_of_the_datas_fingerprint():
    def marked(table: torch.Tensor) -> str:
        return Splits(
            ArrayDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)), tables={"t": table}
        ).fingerprint()

    assert marked(torch.zeros(2)) == marked(torch.zeros(2)) != marked(torch.ones(2))
