"""Presets: what they choose, in which order things win, and what they never touch."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from composed import checked, composed
from stabletrain import config

PRESETS = ("normal", "stable", "safe")
STABILITY_GROUPS = {"precision", "clipping", "schedule", "augmentation", "guard", "checkpoint"}


def without_names(values):
    return {key: value for key, value in values.items() if key not in ("preset", "name")}


def test_there_are_these_presets():
    assert set(config.option_names("preset")) == set(PRESETS)


@pytest.mark.parametrize("experiment", config.option_names("experiment"))
def test_without_a_preset_it_is_normal(experiment):
    assert checked(f"experiment={experiment}") == checked(f"experiment={experiment}", "preset=normal")


def test_without_an_experiment_it_is_digits():
    assert checked() == checked("experiment=digits")
    assert checked("preset=safe") == checked("preset=safe", "experiment=digits")


def test_presets_are_what_the_table_says():
    normal, stable, safe = (checked(f"preset={preset}") for preset in PRESETS)
    assert [values["preset"] for values in (normal, stable, safe)] == list(PRESETS)
    assert [values["optimizer"]["lr"] for values in (normal, stable, safe)] == pytest.approx([1e-4, 5e-5, 1e-5])
    assert [values["precision"]["dtype"] for values in (normal, stable, safe)] == ["bfloat16", "bfloat16", "float32"]
    assert [values["clipping"]["max_norm"] for values in (normal, stable, safe)] == [5.0, 1.0, 0.5]
    assert [values["loss_mode"] for values in (normal, stable, safe)] == ["as_is", "smoothed", "plain"]
    assert [values["accumulate"] for values in (normal, stable, safe)] == [1, 1, 1]
    assert (stable["fp16_initial_scale"], stable["fp16_growth_interval"]) == (1024, 1000)
    assert (stable["precision"]["initial_scale"], stable["precision"]["growth_interval"]) == (1024, 1000)
    assert normal["warmup_epochs"] < stable["warmup_epochs"] < safe["warmup_epochs"]
    assert all("Cosine" in values["schedule"]["_target_"] for values in (normal, stable, safe))
    assert stable["schedule"]["warmup_from"] == 0.1
    assert normal["checkpoint"]["every_updates"] is None
    assert stable["checkpoint"]["every_updates"] is None
    assert safe["checkpoint"]["every_updates"] >= 1
    assert [values["guard"]["on_rejection"] for values in (normal, stable, safe)] == ["skip", "salvage", "rollback"]
    assert [values["guard"].get("scan", False) for values in (normal, stable, safe)] == [False, False, True]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_warm_up_is_shorter_than_the_run_however_short_that_is(preset):
    for epochs in (1, 2, 120, 1000):
        assert checked(f"preset={preset}", f"epochs={epochs}")["schedule"]["warmup_epochs"] <= 0.1 * epochs


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_chooses_options_of_stability_groups_and_numbers_at_the_root(preset):
    content = OmegaConf.load(config.conf_folder() / "preset" / f"{preset}.yaml")
    overridden = {str(key).removeprefix("override /") for line in content.defaults if line != "_self_" for key in line}
    assert overridden <= STABILITY_GROUPS
    assert {"precision", "clipping", "schedule", "guard"} <= overridden
    roots = OmegaConf.load(config.conf_folder() / "config.yaml")
    for key in set(content) - {"defaults"}:
        assert key in roots
        assert key not in config.group_names()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_line_wins_in_whatever_order(preset):
    words = [f"preset={preset}", "precision=fp16", "lr_scale=0.25", "experiment=tabular", "clipping=none"]
    rotations = [words[start:] + words[:start] for start in range(len(words))]
    results = [checked(*order) for order in [*rotations, *(order[::-1] for order in rotations)]]
    assert all(result == results[0] for result in results)
    assert results[0]["precision"]["dtype"] == "float16"
    assert results[0]["lr_scale"] == 0.25
    assert results[0]["clipping"] == checked("clipping=none")["clipping"]  # nothing of the preset's stays inside
    assert results[0]["experiment"] == "tabular"


def test_a_preset_wins_over_an_experiment(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /precision: fp16\n  - override /augmentation: mixup\n  - _self_\n"
        "experiment: mine\nlr_scale: 7.0\nbase_lr: 0.5\n"
    )
    search = f"hydra.searchpath=[file://{tmp_path}]"
    safe = checked(search, "experiment=mine", "preset=safe")
    assert (safe["precision"]["dtype"], safe["lr_scale"], safe["base_lr"]) == ("float32", 0.1, 0.5)
    assert safe["augmentation"] == checked("augmentation=none")["augmentation"]
    normal = checked(search, "preset=normal", "experiment=mine")
    assert (normal["precision"]["dtype"], normal["lr_scale"], normal["experiment"]) == ("bfloat16", 1.0, "mine")
    assert normal["augmentation"] == checked("augmentation=mixup")["augmentation"]
    assert checked(search, "experiment=mine")["precision"]["dtype"] == "float16"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_can_be_chosen_beside_every_preset(preset):
    count = 0
    for group in STABILITY_GROUPS:
        for option in config.option_names(group):
            chosen = checked(f"preset={preset}", f"{group}={option}")[group]
            file = OmegaConf.load(config.conf_folder() / group / f"{option}.yaml")
            assert set(chosen) == set(file), (group, option)
            count += 1
    assert count >= 20


def test_a_preset_never_chooses_the_loss():
    for preset in PRESETS:
        for loss in config.option_names("loss"):
            assert checked(f"preset={preset}", f"loss={loss}")["loss"] == checked(f"loss={loss}")["loss"]


def test_the_composed_config_names_its_options():
    assert composed("preset=safe").preset == "safe"
    assert without_names(checked("+preset=safe")) == without_names(checked("preset=safe"))
