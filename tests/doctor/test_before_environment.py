"""`doctor env`: what is here, and what doesn't fit together."""

from __future__ import annotations

import os

import pytest
import torch

from stabletrain.doctor.before import environment
from stabletrain.doctor.before.environment import examine_environment, fact_lines

HERE = {"driver": None, "gpus": [], "memory_free_bytes": 8 << 30, "disk_free_bytes": 8 << 30, "writable": True}


def test_the_facts_of_this_machine(tmp_path):
    report = examine_environment(tmp_path)
    assert report.facts["versions"]["torch"] == torch.__version__
    assert report.facts["threads"] == torch.get_num_threads()
    assert report.facts["processors"] == len(os.sched_getaffinity(0))
    assert report.facts["disk_free_bytes"] > 0
    lines = "\n".join(fact_lines(report.facts))
    for word in ("versions", "torch", "driver", "memory", "disk_free", "GiB"):
        assert word in lines


def test_a_missing_and_an_old_package(tmp_path, monkeypatch):
    asked = environment.metadata.requires

    def requires(name):
        return (
            ["torch>=2.9", "no-such-package>=1", "numpy>=99", "not-here; extra == 'x'"]
            if name == "stabletrain"
            else asked(name)
        )

    monkeypatch.setattr(environment.metadata, "requires", requires)
    found = {one.what.partition(" ")[0]: one for one in environment._packages()}
    assert set(found) == {"no-such-package", "numpy"}
    assert (found["no-such-package"].severity, found["numpy"].severity) == ("broken", "warning")
    assert found["numpy"].advice == "pip install 'numpy>=99'"


def findings(**facts):
    facts = {**HERE, **facts}
    return [(one.check, one.severity) for part in (environment._gpu, environment._room) for one in part(facts)]


def test_nothing_is_wrong_with_a_machine_that_has_room():
    assert findings() == []


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"memory_free_bytes": 100 << 20}, [("memory", "warning")]),
        ({"memory_free_bytes": None}, []),
        ({"disk_free_bytes": 500 << 20}, [("disk", "warning")]),
        ({"disk_free_bytes": 1 << 20}, [("disk", "broken")]),
        ({"writable": False}, [("disk", "broken")]),
    ],
)
def test_little_room(facts, expected):
    assert findings(**facts) == expected


@pytest.mark.parametrize(
    ("built", "driver", "expected"),
    [
        (None, {"version": "550.1", "cuda": "12.4"}, [("cuda", "warning")]),
        ("13.0", {"version": "550.1", "cuda": "12.4"}, [("driver", "broken")]),
        ("12.8", {"version": "550.1", "cuda": "12.4"}, [("cuda", "warning")]),  # it fits, but no GPU is seen
        ("12.8", None, []),
    ],
)
def test_what_of_torch_and_driver_does_not_fit(built, driver, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", built)
    assert findings(driver=driver) == expected


def test_more_threads_than_processors():
    assert list(environment._processor({"processors": 4, "threads": 4})) == []
    [found] = environment._processor({"processors": 2, "threads": 8})
    assert found.remedy == "threads=2"
