"""How many processes train together."""

from __future__ import annotations

import os

from torch import nn

from stabletrain.errors import ConfigurationError


class SingleProcess:
    """One process, one device.

    Raises:
        ConfigurationError: when a launcher has started several processes: each would train alone.

    Example:
        >>> SingleProcess().wrap(nn.Identity())
        Identity()
    """

    def __init__(self) -> None:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1:
            raise ConfigurationError(
                f"parallel=none under a launcher with {count} processes: each would train the same model alone. "
                "Start one process."
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model
