"""Windows of a series, the model that reads them, and how it is judged: no leak, every rule, every edge."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from composed import checked
from stabletrain.build import build
from stabletrain.data import ArrayDataset, OrderedLoader, Series, regimes, windows_of_file
from stabletrain.data.windows import UNKNOWN, change_labels, row_parts
from stabletrain.errors import ConfigurationError
from stabletrain.loss import CrossEntropy
from stabletrain.model import AttentionPooling, DirectionClassifier
from stabletrain.task import BalancedClassification, balanced_metrics
from stabletrain.trainer import train

ROWS = 120


def series(values, labels=None, reach=0):
    values = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(values)) % 2 if labels is None else np.asarray(labels)
    return Series(values, labels, [f"c{n}" for n in range(values.shape[1])], ("a", "b"), "the test's series", reach)


def normal(rows=ROWS, columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def rows_of(part, reach=0):
    return {row for start in part.starts.tolist() for row in range(start, start + part.length + reach)}


# ------------------------------------------------------------------------------------------------------ division


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(60, 200),
    sequence=st.integers(1, 6),
    stride=st.integers(1, 4),
    gap=st.none() | st.integers(0, 6),
    reach=st.integers(0, 3),
)
def test_parts_share_no_row_and_follow_each_other_with_the_gap_between(rows, sequence, stride, gap, reach):
    splits = series(normal(rows), reach=reach).splits(
        sequence=sequence, stride=stride, gap=gap, validation=0.3, test=0.3
    )
    parts = [rows_of(part, reach) for part in (splits.train, splits.validation, splits.test)]
    for earlier, later in pairwise(parts):
        assert min(later) - max(earlier) > (sequence if gap is None else gap)
    assert max(parts[-1]) < rows


def test_nothing_of_later_rows_reaches_the_training_part():
    values = normal()
    values[5, 0], values[7, 1] = math.nan, math.inf
    splits = series(values).splits(sequence=5)
    end = row_parts(ROWS, validation=0.15, test=0.15, gap=5)[0].stop
    other = values.copy()
    other[end:] = 1e6 * normal(seed=1)[end:] + 7
    changed = series(other).splits(sequence=5)
    for part in (splits, changed):
        windows, _ = part.train.gather(torch.arange(len(part.train)))
        assert torch.isfinite(windows).all()
    assert torch.equal(splits.train.series[:end], changed.train.series[:end])
    mean, deviation = splits.train.series[:end].mean(0), splits.train.series[:end].std(0, correction=0)
    assert torch.allclose(mean, torch.zeros(3), atol=1e-6) and torch.allclose(deviation, torch.ones(3), atol=1e-5)


def test_a_window_is_its_rows_and_the_array_is_not_copied():
    splits = series(normal(), labels=np.arange(ROWS) % 2).splits(sequence=4, stride=3)
    part = splits.validation
    windows, targets = part.gather(torch.tensor([2, 0]))
    for window, target, index in zip(windows, targets, (2, 0), strict=True):
        start = int(part.starts[index])
        assert torch.equal(window, part.series[start : start + 4]) and torch.equal(window, part[index][0])
        assert int(target) == int(part[index][1]) == (start + 3) % 2
    assert splits.train.series.data_ptr() == part.series.data_ptr() == splits.test.series.data_ptr()
    assert (part.starts.diff() == 3).all()


def test_a_series_too_short_says_which_part():
    with pytest.raises(ConfigurationError, match="no window fits into the validation part"):
        series(normal(40)).splits(sequence=10)


# --------------------------------------------------------------------------------------------------------- rules


def test_constant_columns_by_each_rule():
    values = normal()
    values[:, 1] = 0.1  # its deviation is a rounding error
    values[-5:, 1] = 4.0  # changes, but after the training rows
    dropped = series(values).splits(sequence=5)
    assert dropped.facts["in_features"] == 2 and "'c1'" in dropped.notes[0]
    zero = series(values).splits(sequence=5, constant="zero")
    assert zero.facts["in_features"] == 3 and not zero.train.series[:, 1].any()
    with pytest.raises(ConfigurationError, match="nothing changes in 'c1'"):
        series(values).splits(sequence=5, constant="raise")
    with pytest.raises(ConfigurationError, match="no column changes"):
        series(np.ones((ROWS, 2))).splits(sequence=5)


def test_gaps_by_each_rule():
    values = normal()
    values[[0, 10, 11], 1] = math.nan
    median = np.nanmedian(values[:84, 1])

    def column(rule):
        return series(values).splits(sequence=5, gaps=rule, standardize=False).train.series[:, 1]

    assert column("forward")[[10, 11]].tolist() == pytest.approx([values[9, 1]] * 2)
    assert column("forward")[0].item() == pytest.approx(median)
    assert column("median")[[0, 10, 11]].tolist() == pytest.approx([median] * 3)
    dropped = series(values).splits(sequence=5, gaps="drop")
    assert rows_of(dropped.train).isdisjoint({0, 10, 11}) and min(dropped.train.starts) == 1
    assert torch.isfinite(dropped.train.gather(torch.arange(len(dropped.train)))[0]).all()
    with pytest.raises(ConfigurationError, match=r"3 gaps, the first one in row 0 .*'c1'.*gaps=forward"):
        series(values).splits(sequence=5, gaps="raise")


def test_infinities_by_each_rule():
    values = normal()
    values[3, 0], values[100, 2], values[4, 0] = math.inf, -1e39, math.nan
    clipped = series(values).splits(sequence=5, infinities="clip", standardize=False)
    known = values[:84]
    assert clipped.train.series[3, 0].item() == pytest.approx(known[np.isfinite(known[:, 0]), 0].max())
    assert clipped.train.series[100, 2].item() == pytest.approx(known[:, 2].min())
    assert "2 infinities" in clipped.notes[0] and "1 gaps" in clipped.notes[1]
    gap = series(values).splits(sequence=5, standardize=False).train.series
    assert gap[[3, 4], 0].tolist() == pytest.approx([values[2, 0]] * 2)
    with pytest.raises(ConfigurationError, match="2 infinities, the first one in row 3"):
        series(values).splits(sequence=5, infinities="raise")


@pytest.mark.parametrize("option", ["constant", "gaps", "infinities"])
def test_a_rule_that_is_none_is_refused(option):
    with pytest.raises(ConfigurationError, match=f"{option} is 'dorp'; allowed: .*raise"):
        series(normal()).splits(sequence=5, **{option: "dorp"})


def test_the_limit_holds_a_column_that_hardly_changed_in_training():
    values = normal()
    values[:90, 0] *= 1e-6
    free, held = (series(values).splits(sequence=5, limit=limit).train.series for limit in (None, 10.0))
    assert free.abs().max() > 1e5 and held.abs().max() == 10.0


def test_a_huge_but_finite_column_is_scaled_without_overflow():
    values = normal() * 1e30
    assert torch.allclose(
        series(values).splits(sequence=5).train.series,
        series(values / 1e30).splits(sequence=5).train.series,
        atol=1e-5,
    )


# --------------------------------------------------------------------------------------------------------- files


def write(path, *, kind=False, rows=ROWS):
    values = normal(rows)
    lines = ["date,price,volume" + (",kind" if kind else "")]
    for row, (price, volume, _) in enumerate(values):
        word = ["", ",sell", ",hold", ",buy"][1 + row % 3] if kind and row >= 3 else ("," if kind else "")
        lines.append(f"2024-01-{row},{price:.9f},{volume:.9f}{word}")
    path.write_text("\n".join(lines) + "\n")
    return values


def test_a_file_with_a_horizon_asks_where_its_column_goes(tmp_path):
    values = write(tmp_path / "a.csv")
    splits = windows_of_file(tmp_path / "a.csv", "price", exclude=["date"], horizon=4, sequence=6)
    price = values[:, 0]
    end = row_parts(ROWS, validation=0.15, test=0.15, gap=6)[0].stop
    threshold = np.quantile(np.abs(price[4:end] - price[: end - 4]), 1 / 3)
    for part in (splits.train, splits.validation, splits.test):
        for start, target in zip(part.starts.tolist(), part.targets.tolist(), strict=True):
            moved = price[start + 9] - price[start + 5]
            assert target == (2 if moved > threshold else 0 if moved < -threshold else 1)
    assert splits.classes == ("down", "flat", "up") and splits.facts["in_features"] == 2
    assert int(splits.train.starts.max()) + 5 + 4 < end


def test_a_file_with_a_column_of_classes_and_the_same_as_parquet(tmp_path):
    from pyarrow import csv, parquet

    write(tmp_path / "a.csv", kind=True)
    parquet.write_table(csv.read_csv(tmp_path / "a.csv"), tmp_path / "a.parquet")
    one, other = (
        windows_of_file(tmp_path / name, "kind", ["price", "volume"], classes=["sell", "hold", "buy"], sequence=2)
        for name in ("a.csv", "a.parquet")
    )
    assert one.train.targets.tolist() == [(start + 1) % 3 for start in one.train.starts.tolist()]
    assert min(one.train.starts) == 2  # the first rows tell no class
    assert "3 rows" in one.notes[-1]
    assert one.fingerprint() == other.fingerprint()


def test_what_a_file_can_not_give_is_said(tmp_path):
    path = tmp_path / "a.csv"
    write(path, kind=True)
    for arguments, said in (
        ({"target": "prise"}, "no column 'prise'.*Did you mean price"),
        ({"target": "price", "horizon": 4}, "line 2, column 'date': '2024-01-0' is not a number"),
        ({"target": "kind", "features": ["kind"]}, "give a `horizon`"),
        ({"target": "price", "horizon": 0, "exclude": ["date", "kind"]}, "horizon is 0"),
        ({"target": "kind", "exclude": ["date", "price", "volume"]}, "no column to learn from"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            windows_of_file(path, **arguments)


def test_changes_relative_and_unknown():
    values = np.array([1.0, 2.0, math.nan, 4.0, 2.0, 2.0])
    assert change_labels(values, 1, 0.6, "relative", range(6)).tolist() == [2, UNKNOWN, UNKNOWN, 1, 1, UNKNOWN]
    assert change_labels(values, 1, 0.6, "difference", range(6)).tolist() == [2, UNKNOWN, UNKNOWN, 0, 1, UNKNOWN]


# -------------------------------------------------------------------------------------------------------- generator


def test_the_generated_series_is_a_function_of_its_seed_and_its_label_is_what_follows():
    one, same, other = (regimes(rows=900, in_features=4, sequence=20, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    far = regimes(rows=900, in_features=4, sequence=20, seed=1, horizon=9, stride=1, gap=0)
    near = regimes(rows=900, in_features=4, sequence=20, seed=1, horizon=1, stride=1, gap=0)
    # The same windows; what follows 8 rows later is the label of the window that ends 8 rows later.
    assert torch.equal(far.train.targets[:-8], near.train.targets[8 : len(far.train.targets)])


# ------------------------------------------------------------------------------------------------------------ model


def test_pooling_is_the_formula_and_masked_states_do_not_count():
    torch.manual_seed(0)
    pooling = AttentionPooling(3, 5).double()
    states = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    scores = torch.tanh(states @ pooling.hidden.weight.T + pooling.hidden.bias) @ pooling.score.weight[0]
    share = scores[0, mask[0]].exp() / scores[0, mask[0]].exp().sum()
    expected = (share[:, None] * states[0, mask[0]]).sum(0)
    poisoned = states.clone()
    poisoned[~mask] = math.nan
    poisoned.requires_grad_()
    pooled = pooling(poisoned, mask)
    assert torch.allclose(pooled[0], expected, atol=1e-12) and torch.equal(pooled[1], torch.zeros(3).double())
    pooled.sum().backward()
    assert torch.isfinite(poisoned.grad).all() and not poisoned.grad[~mask].any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in pooling.parameters())
    weights = pooling.weights(states)
    assert torch.allclose(weights.sum(1), torch.ones(2).double()) and torch.allclose(
        pooling.weights(states, mask)[0, mask[0]], share
    )


def test_the_clamp_bounds_how_far_one_state_outweighs_another():
    pooling = AttentionPooling(2, 4, clamp=1.0)
    nn.init.constant_(pooling.score.weight, 100.0)
    weights = pooling.weights(torch.randn(3, 6, 2)).detach()
    assert float((weights.amax(1) / weights.amin(1)).max()) <= math.exp(2) * 1.001
    with pytest.raises(ConfigurationError, match=r"clamp .* is -1"):
        AttentionPooling(2, 4, clamp=-1)


def test_the_recurrent_matrices_begin_orthogonal_and_the_forget_gates_open():
    lstm = DirectionClassifier(5, 3, hidden=8, layers=2).recurrent
    gates = [gate for name, matrix in lstm.named_parameters() if "weight_hh" in name for gate in matrix.split(8)]
    assert len(gates) == 16
    for gate in gates:
        assert torch.allclose(gate @ gate.T, torch.eye(8), atol=1e-5)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        total = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}")
        assert total[8:16].eq(1).all() and not total[:8].any() and not total[16:].any()


# ---------------------------------------------------------------------------------------------------------- metrics


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore::UserWarning")  # scikit-learn's, about answers that never occur
def test_metrics_are_those_of_scikit_learn(pairs):
    from sklearn.metrics import balanced_accuracy_score, f1_score

    real, answers = (np.array(column) for column in zip(*pairs, strict=True))
    data = ArrayDataset(torch.eye(4)[torch.from_numpy(answers)], torch.from_numpy(real))
    task = BalancedClassification(CrossEntropy(), 4)
    found = task.evaluate(nn.Identity(), OrderedLoader(data, batch_size=7))
    assert found["macro_f1"] == pytest.approx(f1_score(real, answers, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(real, answers))
    assert found["accuracy"] == pytest.approx((real == answers).mean())
    assert found["majority_accuracy"] == pytest.approx(np.bincount(real).max() / len(real))
    # Two processes with a share each, one of them without a batch: the same numbers.
    parts: list[torch.Tensor] = []
    task.evaluate(nn.Identity(), OrderedLoader(data, batch_size=7), lambda own: parts.append(own) or own)
    again = task.evaluate(nn.Identity(), iter(()), lambda own: own + parts.pop(0))
    assert again == found


def test_metrics_of_nothing_are_zero():
    assert set(balanced_metrics(torch.zeros(3, 3)).values()) == {0.0}


# ------------------------------------------------------------------------------------------------------- experiment

SMALL = ("experiment=direction", "data.rows=900", "data.in_features=6", "data.sequence=20", "model.hidden=8", "seed=3")
SHORT = ("epochs=3", "batch_size=16", "tracking=quiet", "device=cpu")


def trained(folder, *overrides):
    given = [*SMALL, *SHORT, *overrides]
    run = build(checked(*given), folder, given)
    return run, train(run)


def test_the_experiment_is_what_it_promises():
    plain, mild, steep = (checked("experiment=direction", f"preset={name}") for name in ("safe", "stable", "normal"))
    assert (steep["batch_size"], steep["data"]["sequence"], steep["data"]["in_features"]) == (128, 60, 110)
    assert steep["loss"]["gamma"] == 2.5 and steep["loss"]["class_counts"] == "auto"
    assert "Mixup" in steep["augmentation"]["_target_"] and "Unchanged" in plain["augmentation"]["_target_"]
    assert (plain["loss_mode"], mild["loss_mode"]) == ("plain", "smoothed")


def test_bad_samples_are_named_and_survived(tmp_path):
    run, summary = trained(
        tmp_path / "run", "preset=stable", "fault=nan_input", "fault.at=0", "fault.times=2", "guard.max_quarantined=0.5"
    )
    assert summary.status == "completed" and summary.rejected == 0 and summary.salvaged >= 2
    assert summary.quarantined == run.fault.indices and len(run.fault.indices) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finite"]["parameters"] is True


def test_a_file_that_made_every_loss_nan_trains(tmp_path):
    """The failure that its authors met: dividing by the deviation of a constant column, with infinities in others."""
    values = normal(300, 4)
    values[:, 1] = 5.0
    values[20, 2], values[30, 3] = math.inf, math.nan
    with np.errstate(all="ignore"):
        by_hand = (values - values.mean(0)) / values.std(0)
    assert np.isnan(by_hand[:, 1:]).all()  # 3 of 4 columns are lost, from the first step on
    lines = ["a,b,c,d", *(",".join(map(repr, row)) for row in values.tolist())]
    (tmp_path / "bad.csv").write_text("\n".join(lines) + "\n")
    given = ["experiment=direction", "data=windows", f"data.path={tmp_path / 'bad.csv'}", "data.target=a"]
    given += ["data.horizon=2", "data.sequence=10", "model.hidden=4", *SHORT]
    run = build(checked(*given), tmp_path / "run", given)
    summary = train(run)
    assert (summary.status, summary.rejected) == ("completed", 0) and summary.updates >= 5
    assert [word in " ".join(run.notes) for word in ("constant=drop", "infinities=gap", "gaps=forward")] == [True] * 3
    assert math.isfinite(summary.metrics["test"]["macro_f1"])


def test_half_precision_with_accumulation_overflows_and_goes_on(tmp_path):
    _, summary = trained(
        tmp_path / "run", "precision=fp16", "accumulate=2", "fault=fp16_overflow", "fault.at=3", "augmentation=none"
    )
    assert summary.status == "completed" and summary.reasons.get("overflow", 0) >= 1
    assert summary.finite["parameters"] and summary.updates == summary.steps - summary.rejected > 0
