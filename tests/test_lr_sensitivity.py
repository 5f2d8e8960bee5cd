"""The program of docs/lr_sensitivity.md: its definitions on curves with known answers, settings that can be built."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from composed import checked

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("lr_sensitivity")


def test_the_definitions(program: Any) -> None:
    losses = [4.0, 3.0, 2.1, 2.0, 2.19, 2.4, 3.0]
    assert program.sensitivity(losses) == pytest.approx(sum(loss - 2.0 for loss in losses) / 7)
    assert program.one_sided(losses) == pytest.approx((0.0 + 0.19 + 0.4 + 1.0) / 4)
    assert program.from_high([2.0, *losses[:6]]) == pytest.approx((0.1 + 0.0 + 0.19 + 0.4) / 4)
    assert program.usable(losses) == pytest.approx(1.0, abs=0.05)  # from 3e-3 to 3e-2
    assert program.one_sided([2.0] * 7) == 0.0
    assert program.usable([2.0] * 7) == pytest.approx(3.0)
    assert program.usable([2.0, 3.0, 2.0, 3.0, 3.0, 3.0, 3.0]) == 0.0  # a gap ends it


def test_results_are_bounded_whole_and_of_the_settings_of_today(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    losses = [3.5, 3.0, 2.5, 2.0, 2.1, 9.0, math.nan]
    lines = []
    for seed, count in ((0, 7), (1, 6)):  # the second seed isn't done
        for rate, loss in list(zip(program.RATES, losses, strict=True))[:count]:
            given = program.overrides("bare", rate, seed)
            one = {"variant": "bare", "rate": rate, "seed": seed, "first": 4.0, "loss": loss, "overrides": given}
            lines.append(json.dumps(one))
    stale = {"variant": "bare", "rate": 3e-4, "seed": 0, "first": 4.0, "loss": 0.0, "overrides": ["epochs=2"]}
    results.write_text("\n".join([*lines, json.dumps(stale), '{"variant": "bare", "ra']))
    assert program.curves(results) == {"bare": [[3.5, 3.0, 2.5, 2.0, 2.1, 4.0, 4.0]]}
    program.report(results, tmp_path / "plot.png")
    assert (
        "| bare | 1 | 1.014 (1.014 to 1.014) | 1.025 (1.025 to 1.025) | 1.025 (1.025 to 1.025) | 0.5 | 2.00 |"
        in capsys.readouterr().out
    )
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_finished_run_is_passed_over(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []

    def noted(given: list[str]) -> dict[str, Any]:
        done.append(given)
        if len(done) == 10:
            raise KeyboardInterrupt
        return {"first": 4.0, "loss": 3.0, "ended": "completed"}

    monkeypatch.setattr(program, "trained", noted)
    results = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        program.run_all(results, ["bare", "qk-norm"], [0])
    program.run_all(results, ["bare", "qk-norm"], [0])
    assert len(done) == 2 * 7 + 1  # the one that was interrupted comes again
    assert len({tuple(given) for given in done}) == 2 * 7
    assert set(program.curves(results)) == {"bare", "qk-norm"}


def test_every_variant_can_be_built_from_its_settings(program: Any) -> None:
    for variant in program.VARIANTS:
        config = checked(*program.overrides(variant, 1e-2, 3))
        assert config["optimizer"]["lr"] == 1e-2, variant
        assert config["optimizer"]["weight_decay"] == 1e-2, variant
        assert config["seed"] == 3
