"""A run that is built to be looked at, and goes away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stabletrain.build import build
from stabletrain.trainer import Run


@contextmanager
def built(config: dict[str, Any]) -> Iterator[Run]:
    """Build a run of one process whose folder is temporary, and close it afterwards.

    Raises:
        ConfigurationError: as `stabletrain.build.build` does.
        PartFailed: likewise.
    """
    alone = {**config, "parallel": {"_target_": "stabletrain.parallel.SingleProcess"}, "resume": "auto"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = build(alone, Path(folder, "run"))
        if run.folder is not None:
            stack.callback(run.folder.close)
        stack.callback(run.fault.close)
        stack.callback(run.tracker.close)
        yield run
