"""What the libraries warn of by themselves."""

from __future__ import annotations

import pytest

LIGHTNING = (
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning:lightning\.pytorch\.utilities\._pytree",
)


def pytest_configure(config: pytest.Config) -> None:
    for warning in LIGHTNING:
        config.addinivalue_line("filterwarnings", warning)
