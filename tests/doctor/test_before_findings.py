"""What was found becomes a table, a file and an exit code."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composed import checked
from stabletrain.doctor.before.findings import EXIT_CODES, Finding, Report, listed, plain_lines
from stabletrain.doctor.before.overrides import first_known, known, rounded_down
from stabletrain.errors import ConfigurationError


def finding(severity, **content):
    return Finding(**{"severity": severity, "check": "x", "where": "data", "what": "w", "evidence": "e", **content})


@given(st.lists(st.sampled_from(["broken", "warning", "note"])))
def test_the_worst_finding_decides_the_exit_code_and_comes_first(severities):
    report = Report(subject="s", findings=[finding(severity) for severity in severities])
    assert report.code == max((EXIT_CODES[severity] for severity in severities), default=0)
    shown = [one.severity for one in report.sorted()]
    assert shown == sorted(shown, key=["broken", "warning", "note"].index)
    assert report.verdict().partition(":")[0] == {0: "clean", 1: "warnings", 3: "broken"}[report.code]


def test_the_file_holds_everything_even_where_numbers_are_not_finite(tmp_path):
    one = finding("broken", remedy="epochs=2", advice="Wait.", samples=list(range(50)))
    report = Report(subject="s", findings=[finding("note"), one], facts={"headroom": math.inf}, seconds=1.5)
    path = report.write(tmp_path / "new")
    assert path == tmp_path / "new" / "doctor.json"
    content = json.loads(path.read_text())
    assert (content["verdict"], content["exit_code"]) == ("broken", 3)
    assert content["findings"][0]["samples"] == list(range(50))
    assert content["findings"][0]["remedy"] == "epochs=2"
    assert [each["severity"] for each in content["findings"]] == ["broken", "note"]
    assert report.write(tmp_path / "other.json") == tmp_path / "other.json"


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="to=<folder>"):
        Report(subject="s").write(tmp_path / "file")


def test_plain_lines_name_evidence_and_remedy():
    lines = plain_lines("s", [finding("warning", remedy="epochs=2"), finding("note", advice="Wait.")])
    assert lines[1:] == [
        "warning  data: w",
        "         evidence: e",
        "         remedy:   epochs=2",
        "note     data: w",
        "         evidence: e",
        "         advice:   Wait.",
    ]


def test_only_overrides_of_this_config_are_remedies():
    config = checked("experiment=tabular")
    assert known(config, "guard=salvage", "guard.scan=true") == "guard=salvage guard.scan=true"
    assert known(config, "guard.scan=true") == ("guard.scan=true" if "scan" in config["guard"] else "")
    assert known(config, "data.nonfinite=drop") == ""
    assert known(config, "precision=fp12") == ""
    assert first_known(config, "data.nonfinite=drop", "loss=weighted") == "loss=weighted"


@given(st.floats(1e-12, 1e12))
def test_a_rounded_number_has_one_digit_and_is_not_above(value):
    rounded = float(rounded_down(value))
    assert value / 2 < rounded <= value * (1 + 1e-6)
    assert len(f"{rounded:e}".partition("e")[0].rstrip("0").rstrip(".")) == 1


def test_long_lists_are_cut():
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
