"""The project as its users get it: a wheel, built through the source distribution, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("src", "conf", "pyproject.toml", "LICENSE", "README.md")


@dataclass(frozen=True)
class Installation:
    """A wheel and the environment that it is installed in."""

    wheel: Path
    sdist: Path
    programs: Path  # the folder of the environment's programs: python and stabletrain

    @property
    def site_packages(self) -> Path:
        """Where the wheel's files are."""
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.programs.parent)}))

    def run(self, program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs in `folder`, with nothing of the checkout in sight."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.programs / program), *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def install(place: Path) -> Installation:
    """Build the wheel in `place` as `python -m build` does and install it, with the dependencies of this environment."""
    source, built, environment = place / "source", place / "dist", place / "environment"
    source.mkdir()
    for name in BUILT_FROM:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(PROJECT / name, source / name)
    # Without isolation: setuptools is here already, and the test needs no network.
    _succeed([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source)])
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")

    venv.create(environment, with_pip=False, symlinks=True)
    installation = Installation(wheel, sdist, environment / "bin")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(environment / "bin" / "python"),
        "install",
        "--no-input",
        "--quiet",
    ]
    _succeed([*pip, "--no-deps", "--no-index", str(wheel)])
    # Only now, or pip would find this environment's own stabletrain. The .pth files in a folder that a .pth file names are
    # ignored, so an editable install of the checkout stays out of sight.
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (installation.site_packages / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in here))
    return installation


def _succeed(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
