"""The project as its users get it: a wheel, built through the source distribution, in an environment of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from processes import run

PROJECT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("src", "conf", "pyproject.toml", "LICENSE", "README.md")


@dataclass(frozen=True)
class Installation:
    """A wheel and the environment that it is installed in."""

    place: Path

    @property
    def wheel(self) -> Path:
        [file] = self.place.glob("dist/*.whl")
        return file

    @property
    def sdist(self) -> Path:
        [file] = self.place.glob("dist/*.tar.gz")
        return file

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.place / "environment")}))

    def program(self, name: str) -> str:
        return str(self.place / "environment" / "bin" / name)

    def run(self, name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs in `folder`, with nothing of the checkout in sight."""
        command = [self.program(name), *arguments]
        return run(command, folder, surroundings())


def installation(place: Path) -> Installation:
    """Return the installation in `place`; the first of the processes that ask builds it, the others wait."""
    ready = place / "ready"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            shutil.rmtree(place, ignore_errors=True)
            build(place)
            ready.touch()
    return Installation(place)


def build(place: Path) -> None:
    """Build the wheel as `python -m build` does and install it; its dependencies are those of this environment."""
    source, environment = place / "source", place / "environment"
    source.mkdir(parents=True)
    for name in BUILT_FROM:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(PROJECT / name, source / name)
    # Without isolation: setuptools is here already, and the test needs no network.
    succeed("-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(source))

    venv.create(environment, with_pip=False, symlinks=True)
    made = Installation(place)
    succeed(
        "-m", "pip", "--python", made.program("python"), "install", "-q", "--no-deps", "--no-index", str(made.wheel)
    )
    # Only now, or pip would find this environment's own stabletrain. A folder that a .pth file names has its own .pth
    # files ignored, so an editable install of the checkout stays out of sight.
    dependencies = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (made.site_packages / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in dependencies))


def succeed(*arguments: str) -> None:
    """Run Python with these arguments and show what it printed if it fails."""
    done = run([sys.executable, *arguments], environment=surroundings())
    assert done.returncode == 0, f"python {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


def surroundings() -> dict[str, str]:
    """Return this process's environment variables without those that show Python the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
