"""What the libraries warn of by themselves."""

from __future__ import annotations

import pytest

WARNINGS = (
    # Lightning asks torch in the way of older versions.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning:lightning\.pytorch\.utilities\._pytree",
)


def pytest_configure(config: pytest.Config) -> None:
    for warning in WARNINGS:
        config.addinivalue_line("filterwarnings", warning)
