"""What every test stands on: one thread, no state left behind by another test, hypothesis without a clock."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Before torch is imported, and for the processes that tests start: two workers share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

from installation import Installation, installation

# A loaded machine must not fail a test, and a failure must repeat.
settings.register_profile("stabletrain", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("stabletrain")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Give the installed wheel, which all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return installation((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "installed")


@pytest.fixture(autouse=True)
def known_start() -> Iterator[None]:
    """Start each test from the same random numbers, and see that it leaves torch's global settings as they were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = global_settings()
    yield
    after = global_settings()
    torch.set_default_dtype(before["default dtype"])
    torch.set_num_threads(before["threads"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    torch.set_grad_enabled(before["gradients enabled"])
    torch.set_float32_matmul_precision(before["matmul precision"])
    assert after == before, f"the test left global settings changed: {before} became {after}"


def global_settings() -> dict[str, object]:
    """Return the settings of torch that hold for a whole process and that a run may set."""
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients enabled": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }
