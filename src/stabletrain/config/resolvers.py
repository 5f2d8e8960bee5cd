"""The `${stabletrain.…}` functions of the configs: names of runs and sweeps, products, values by preset."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import secrets
from datetime import datetime
from typing import Any

from omegaconf import OmegaConf


@functools.cache
def stamp() -> str:
    """Return what tells this launch from all others: torchrun's run id, or the time with four random digits.

    The same for all ranks of a launch, also after torchrun has started them again, and for all jobs of a sweep.
    `stamp.cache_clear()` begins a new launch.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    own = launch if launch != "none" else f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return own
    from stabletrain.collectives import first_to_say

    return first_to_say("stabletrain/stamp", own)


def _name(*parts: str) -> str:
    return "-".join([*(str(part) for part in parts), stamp()])


def _sweep(name: str) -> str:
    return f"sweep-{stamp()}" if str(name).endswith(stamp()) else str(name)


def _overrides(joined: str) -> str:
    """Return a file name for a job's overrides; where something had to be changed, a hash keeps it unique."""
    kept = ",".join(part for part in joined.split(",") if not part.startswith("name="))
    safe = re.sub(r"[^\w=.,+-]", "_", kept)[:100]
    if safe == kept:
        return safe if safe != "" else "job"
    return f"{safe}-{hashlib.blake2b(kept.encode(), digest_size=4).hexdigest()}"


def _product(*factors: Any) -> float:
    return math.prod(float(factor) for factor in factors)


def _by_preset(preset: str, values: Any, otherwise: Any) -> Any:
    """Return what the preset has among the values by name, such as `{safe:8,stable:2}`; if nothing, the last one."""
    return values.get(preset, otherwise)


for _resolver in (_name, _sweep, _overrides, _product, _by_preset):
    OmegaConf.register_new_resolver(f"stabletrain.{_resolver.__name__[1:]}", _resolver, replace=True)
OmegaConf.register_new_resolver("stabletrain.stamp", stamp, replace=True)
