"""The wheel holds everything, and what it installs runs from an empty folder."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from installation import Installation

PROJECT = Path(__file__).resolve().parents[2]


def expected() -> set[str]:
    """Return the files that a user must get, as paths in the wheel."""
    source, conf = PROJECT / "src", PROJECT / "conf"
    modules = {file.relative_to(source).as_posix() for file in source.rglob("*.py")}
    configs = {f"stabletrain/conf/{file.relative_to(conf).as_posix()}" for file in conf.rglob("*.yaml")}
    assert len(modules) > 30
    assert len(configs) > 45
    return modules | configs | {"stabletrain/py.typed", "stabletrain/conf/__init__.py"}


def test_the_wheel_holds_every_module_and_every_config_and_nothing_else(installed: Installation) -> None:
    names = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    assert names == expected()


def test_the_source_distribution_holds_what_the_wheel_is_built_from(installed: Installation) -> None:
    with tarfile.open(installed.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    from_conf = {name for name in expected() if name.startswith("stabletrain/conf/")}
    assert {name.removeprefix("stabletrain/") for name in from_conf} <= names
    assert {f"src/{name}" for name in expected() - from_conf} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_metadata_say_what_it_is(installed: Installation) -> None:
    archive = zipfile.ZipFile(installed.wheel)
    [folder] = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.10" in metadata
    assert "Requires-Dist: torch>=2.9\n" in metadata
    assert "stabletrain = stabletrain.__main__:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()


def test_python_finds_the_installed_package(installed: Installation, tmp_path: Path) -> None:
    program = "import stabletrain, stabletrain.conf; print(stabletrain.__file__); print(stabletrain.conf.__file__)"
    done = installed.run("python", "-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    places = [Path(line) for line in done.stdout.split()]
    assert places == [installed.site_packages / "stabletrain" / name for name in ("__init__.py", "conf/__init__.py")]


@pytest.mark.parametrize("command", [("python", "-m", "stabletrain"), ("stabletrain",)])
def test_help_lists_the_groups(installed: Installation, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = installed.run(*command, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for group in ("preset", "precision", "guard", "experiment"):
        assert f"{group}:" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("python", "-m", "stabletrain"), ("stabletrain",)])
def test_it_trains_in_an_empty_folder(installed: Installation, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = installed.run(*command, "+experiment=digits", "epochs=1", "name=first", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["updates"] > 0
    assert all(summary["finite"].values())
