"""The layers of the house: which module may import which, and what importing the package may not load."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import run

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "stabletrain"

# From the bottom up. A module (or package) imports from lines above its own only, and from itself.
LAYERS = (
    {"errors", "plain", "randomness", "signals", "state", "tree"},
    {"checks", "collectives", "finite", "folder", "roles", "safe"},
    {"sealed"},
    {
        "augmentation",
        "checkpoint",
        "clipping",
        "data",
        "ema",
        "fault",
        "guard",
        "incident",
        "initialisation",
        "loss",
        "model",
        "optimizer",
        "parallel",
        "precision",
        "quarantine",
        "ramp",
        "schedule",
        "task",
        "tracking",
    },
    {"weights"},
    {"trainer", "integrations"},
    {"assembly"},
    {"build", "config"},
    {"messages"},
    {"doctor", "export", "sweep"},
    {"__main__"},
)
MAY_USE_HYDRA = {"build", "config", "sweep", "__main__"}
HYDRA = {"hydra", "omegaconf"}
FRAMEWORKS = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
# The package itself resolves public names lazily; inside the project each is imported from its home.
ROOT_NAMES = {"__version__"}


def layer(unit: str) -> int:
    found = [number for number, units in enumerate(LAYERS) if unit in units]
    assert len(found) == 1, f"stabletrain.{unit} has no single place in LAYERS; add it to the layer it belongs to"
    return found[0]


def imported(source: str, module: str) -> Iterator[str]:
    """Yield the full name of each module or name that `source` imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """Return what is wrong with the imports of `source`, the text of a module such as `stabletrain.guard.ledger`."""
    unit = module.split(".")[1]
    found = []
    for name in imported(source, module):
        top, *rest = name.split(".")
        if top in HYDRA and unit not in MAY_USE_HYDRA:
            found.append(f"{module} imports {name}; Hydra belongs to {sorted(MAY_USE_HYDRA)}")
        if top in FRAMEWORKS and unit != "integrations":
            found.append(f"{module} imports {name}; other people's loops belong to integrations")
        if top != "stabletrain":
            continue
        if not rest or (len(rest) == 1 and not any(rest[0] in units for units in LAYERS)):
            if not rest or rest[0] not in ROOT_NAMES:
                found.append(f"{module} imports {name} through the package; import it from its home")
        elif rest[0] != unit and layer(rest[0]) >= layer(unit):
            found.append(f"{module} (layer {layer(unit)}) imports {name} (layer {layer(rest[0])})")
    return found


def modules() -> dict[str, Path]:
    """Return all modules below the package: full name (of a package's `__init__`, with `__init__`) and file."""
    files = (file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")
    return {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in files}


def test_every_module_has_its_layer() -> None:
    units = {module.split(".")[1] for module in modules()}
    assert units == set().union(*LAYERS), "LAYERS and src/stabletrain differ; list each module once, and only real ones"
    assert sum(len(layer) for layer in LAYERS) == len(units), "a module stands in two layers"


def test_imports_run_downward() -> None:
    found = [line for module, file in modules().items() for line in violations(file.read_text(), module)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("stabletrain.guard.ledger", "from stabletrain.trainer import train"),
        ("stabletrain.guard.ledger", "import stabletrain.clipping"),
        ("stabletrain.guard.ledger", "def late():\n    from stabletrain.build import build"),
        ("stabletrain.guard.ledger", "from ..trainer.run import Run"),
        ("stabletrain.guard.__init__", "from ..clipping import Norm"),
        ("stabletrain.guard.ledger", "from stabletrain import trainer"),
        ("stabletrain.guard.ledger", "from stabletrain import StepGuard"),
        ("stabletrain.guard.ledger", "import stabletrain"),
        ("stabletrain.errors", "from stabletrain.state import Progress"),
        ("stabletrain.trainer.loop", "from omegaconf import OmegaConf"),
        ("stabletrain.assembly", "import hydra.utils"),
        ("stabletrain.trainer.loop", "from transformers import Trainer"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("stabletrain.guard.ledger", "from stabletrain.guard.verdict import Verdict\nfrom .snapshot import Snapshot"),
        ("stabletrain.guard.ledger", "from stabletrain.errors import ConfigurationError\nimport torch"),
        ("stabletrain.guard.__init__", "from .ledger import Ledger"),
        ("stabletrain.tracking.environment", "from stabletrain import __version__"),
        ("stabletrain.build", "from hydra.utils import instantiate\nfrom stabletrain.assembly import assemble"),
        ("stabletrain.__main__", "from stabletrain import config"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that are loaded after `statement` ran in a fresh process."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_hydra() -> None:
    loaded = loaded_by("import stabletrain")
    assert "stabletrain" in loaded
    assert not loaded & {"torch", "numpy", *HYDRA}


@pytest.mark.parametrize(
    "statement",
    [
        "import stabletrain.guard",
        "from stabletrain import StepGuard",
        "import stabletrain.trainer, stabletrain.assembly",
    ],
)
def test_torch_alone_is_enough_without_the_command(statement: str) -> None:
    loaded = loaded_by(statement)
    assert "torch" in loaded
    assert not loaded & HYDRA


def test_the_guard_needs_nothing_but_torch() -> None:
    loaded = loaded_by("import stabletrain.guard")
    assert not loaded & {"sklearn", "tensorboard", "pytorch_optimizer", "yaml"}


def test_the_command_line_is_read_without_torch() -> None:
    assert "torch" not in loaded_by("import stabletrain.__main__")
