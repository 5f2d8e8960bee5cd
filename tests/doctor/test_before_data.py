"""The doctor reads all data: each planted fault is found, with its samples, and healthy data gives nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from stabletrain.data import ArrayDataset
from stabletrain.doctor.before.data import examine_data
from stabletrain.doctor.before.examine import undivided
from stabletrain.precision import Precision

from .subjects import by_check, checked, network, subject, table

FLAWS = torch.tensor([3, 300])  # one in the first chunk of 256, one in the second


def spoiled(value: float, column: int = 2) -> ArrayDataset:
    data = table()
    data.inputs[FLAWS, column] = value
    return data


def examined(train=None, classes=2, **options):
    one = subject(train, **options)
    return by_check(examine_data(one, classes, progress=False)), one


def test_healthy_data_give_nothing():
    found, one = examined()
    assert found == {}
    assert one.bad_samples == []


@pytest.mark.parametrize(("value", "check"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "inf")])
def test_values_that_are_not_finite(value, check):
    found, one = examined(spoiled(value))
    assert set(found) == {check}
    assert found[check].samples == [3, 300] == one.bad_samples
    assert found[check].severity == "broken"
    assert found[check].remedy == "data.nonfinite=drop"
    assert "2 of 320 samples: 3, 300" in found[check].evidence


def test_without_a_policy_for_them_the_guard_leaves_them_out_unless_they_are_too_many():
    found, _ = examined(spoiled(float("nan")), config=("data=digits",))
    assert found["nan"].remedy == "guard=salvage guard.scan=true"
    data = table()
    data.inputs[:100] = float("nan")
    found, _ = examined(data, config=("data=digits",))
    assert found["nan"].remedy == ""
    assert found["nan"].advice


def test_a_flaw_in_the_validation_part_is_told_with_its_place_there():
    validation = table(64, seed=1)
    validation.inputs[7, 0] = float("nan")
    found, one = examined(validation=validation)
    assert found["nan"].where == "data, validation"
    assert found["nan"].samples == [7]
    assert one.bad_samples == []


def test_what_overflows_depends_on_the_precision():
    large = spoiled(7e4)
    large.inputs[:, 2] *= 1e4  # so that it is no outlier
    large.inputs[FLAWS, 2] = 7e4
    half, _ = examined(large, precision=lambda device: Precision("float16", device=device))
    assert half["overflow"].samples == [3, 300]
    assert half["overflow"].remedy == "precision=bf16"
    assert "7e+04, beyond 6.55e+04" in half["overflow"].evidence
    full, _ = examined(large)
    assert "overflow" not in full
    full, _ = examined(spoiled(1e30))
    assert full["overflow"].samples == [3, 300]
    assert full["overflow"].severity == "broken"


def test_a_constant_column_is_named():
    data = table()
    data.inputs[:, 1] = 5.0
    found, _ = examined(data)
    assert set(found) == {"constant"}
    assert "1 of 4 columns: 1, with the value 5" in found["constant"].evidence


@pytest.mark.parametrize(("factor", "there"), [(3e4, True), (1e3, False)])
def test_columns_of_very_different_scale(factor, there):
    data = table()
    data.inputs[:, 3] *= factor
    found, _ = examined(data, config=("data.standardize=false",))
    assert set(found) == ({"scales"} if there else set())
    if there:
        assert found["scales"].remedy == "data.standardize=true"
        assert "column 3 varies" in found["scales"].evidence


def test_outliers_are_named_and_heavy_tails_are_none():
    found, one = examined(spoiled(300.0))
    assert set(found) == {"outlier"}
    assert found["outlier"].samples == [3, 300]
    assert "in column 2" in found["outlier"].evidence
    assert one.bad_samples == []  # they can be trained on
    heavy = table()
    heavy.inputs.exp_()
    assert examined(heavy)[0] == {}


def test_mostly_zero_columns_have_no_outliers():
    data = table()
    data.inputs[:, 1] = 0.0
    data.inputs[::40, 1] = 1.0  # a rare word
    assert examined(data)[0] == {}


def test_labels_out_of_range_are_named():
    data = table()
    data.targets[FLAWS] = 2
    found, one = examined(data)
    assert found["label_range"].samples == [3, 300] == one.bad_samples
    assert found["label_range"].severity == "broken"
    assert found["label_range"].remedy == "model.num_classes=3"


def test_nan_in_labels():
    data = ArrayDataset(table().inputs, torch.rand(320, 2))
    data.targets /= data.targets.sum(1, keepdim=True)
    data.targets[FLAWS, 0] = float("nan")
    found, one = examined(data, validation=ArrayDataset(table(64, seed=1).inputs, torch.full((64, 2), 0.5)))
    assert found["nonfinite_label"].samples == [3, 300] == one.bad_samples
    assert set(found) == {"nonfinite_label"}


def test_labels_that_are_no_distribution():
    data = ArrayDataset(table().inputs, torch.full((320, 2), 0.5))
    data.targets[3] = torch.tensor([1.0, 1.0])
    data.targets[300] = torch.tensor([1.5, -0.5])
    found, _ = examined(data, validation=ArrayDataset(table(64, seed=1).inputs, torch.full((64, 2), 0.5)))
    assert {name: one.samples for name, one in found.items()} == {"label_mixture": [3, 300]}


def test_imbalance():
    data = table()
    data.targets[:] = 0
    data.targets[:9] = 1
    found, _ = examined(data)
    assert set(found) == {"imbalance"}
    assert "class 0 has 311 samples, class 1 has 9" in found["imbalance"].evidence
    assert found["imbalance"].remedy == "loss=weighted"
    found, _ = examined(data, config=("preset=safe",))
    assert found["imbalance"].remedy == "loss=weighted loss_mode=as_is"


def test_a_class_missing_in_training_is_a_warning_and_in_validation_a_note():
    train, validation = table(classes=3), table(64, classes=3, seed=1)
    train.targets[train.targets == 2] = 0
    found = examine_data(subject(train, validation=validation, model=network(classes=3)), 3, progress=False)
    assert [(one.check, one.severity, one.where) for one in found] == [("missing_class", "warning", "data, training")]
    train, validation.targets[:] = table(classes=3), 1
    found = examine_data(subject(train, validation=validation, model=network(classes=3)), 3, progress=False)
    assert [(one.check, one.severity, one.where) for one in found] == [("missing_class", "note", "data, validation")]


def test_repeated_samples_and_those_with_another_label():
    data = table(40)
    data.inputs[30], data.targets[30] = data.inputs[2], data.targets[2]
    found, _ = examined(data)
    assert set(found) == {"duplicate"}
    assert found["duplicate"].samples == [30]
    data.targets[30] = 1 - data.targets[2]
    found, _ = examined(data)
    assert "2 and 30 have the same inputs and the labels" in found["duplicate"].evidence


def test_one_repetition_among_many_samples_is_a_note():
    data = table()
    data.inputs[300], data.targets[300] = data.inputs[3], data.targets[3]
    assert examined(data)[0]["duplicate"].severity == "note"


def test_samples_in_training_and_validation():
    train, validation = table(), table(64, seed=1)
    validation.inputs[[5, 60]] = train.inputs[[300, 3]]
    found, _ = examined(train, validation=validation)
    assert set(found) == {"leak"}
    assert found["leak"].samples == [5, 60]
    assert found["leak"].where == "data, validation"
    assert "validation sample 5 is training sample 300" in found["leak"].evidence


def sequences(lengths: list[int]) -> ArrayDataset:
    torch.manual_seed(0)
    return ArrayDataset([torch.randn(length, 4) for length in lengths], torch.arange(len(lengths)) % 2)


def test_empty_sequences_and_samples_of_zeros():
    data = sequences([5, 7, 0, 6, 0, 9])
    data.inputs[3] = torch.zeros(6, 4)
    found, one = examined(data, batch_size=2, validation=sequences([4, 3]))
    assert found["empty"].samples == [2, 4] == one.bad_samples
    assert found["all_zero"].samples == [3]
    assert found["all_zero"].severity == "note"


class Torn(Dataset):
    """A data set that can't return two of its samples, as with broken image files."""

    def __init__(self) -> None:
        self.whole = table()
        self.targets = self.whole.targets

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int):
        if index in (3, 300):
            raise OSError(f"image {index} is truncated")
        return self.whole[index]


def test_samples_that_cannot_be_read_are_named_and_the_others_are_looked_at():
    data = Torn()
    data.whole.inputs[9] = float("nan")
    found, one = examined(data)
    assert found["unreadable"].samples == [3, 300]
    assert "OSError: image 3 is truncated" in found["unreadable"].evidence
    assert found["nan"].samples == [9]
    assert one.bad_samples == [3, 9, 300]


class Mixed(Torn):
    """Samples that are numbers or vectors, which no batch can hold."""

    def __getitem__(self, index: int):
        return (self.whole.inputs[index], 0) if index else (0.5, 0)


def test_samples_that_fit_in_no_batch():
    found, _ = examined(Mixed())
    assert found["batch"].severity == "broken"


class Unlabelled(Dataset):
    """A data set that cannot be divided: -1 stands for a missing label."""

    def __init__(self) -> None:
        whole = table()
        self.inputs, self.targets = whole.inputs, whole.targets.clone()
        self.targets[FLAWS] = -1

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.inputs[index], self.targets[index]


def test_a_data_set_that_cannot_be_divided_is_examined_as_it_is():
    target = f"{Unlabelled.__module__}.Unlabelled"
    settings = checked("data=dataset", f"data.dataset._target_={target}", "model=mlp")
    [found] = undivided(settings, progress=False)
    assert (found.check, found.samples, found.where) == ("label_range", [3, 300], "data, all")


def test_images_are_compared_by_channel():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 8, 8)
    images[:, :, 0, 0] = 0.0  # a dark corner is no constant column
    images[:, 2] = 1.0
    data = ArrayDataset(images, torch.arange(64) % 2)
    one = subject(data, validation=ArrayDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 2))
    found = by_check(examine_data(one, 2, progress=False))
    assert set(found) == {"constant"}
    assert "1 of 3 columns: 2" in found["constant"].evidence


def test_the_data_are_left_as_they_were():
    data = spoiled(float("nan"))
    before = data.inputs.clone()
    one = subject(data)
    torch.manual_seed(5)
    draw = torch.rand(3)
    torch.manual_seed(5)
    examine_data(one, 2, progress=False)
    assert torch.equal(torch.rand(3), draw)
    assert torch.equal(before.nan_to_num(7.0), data.inputs.nan_to_num(7.0))


def test_the_splits_of_a_run_may_lack_validation():
    one = subject()
    one.run.validation = None
    assert examine_data(one, 2, progress=False) == []
