"""Words that were nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return a sentence that names the nearest allowed word, or nothing if none is near.

    Example:
        >>> did_you_mean("precison", ["precision", "optimizer"])
        " Did you mean 'precision'?"
    """
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if len(near) > 0 else ""
