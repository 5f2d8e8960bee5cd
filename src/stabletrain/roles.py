"""Which part of a model a parameter plays: norm, bias, embedding, last linear layer; and parameters by name pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter

from stabletrain.errors import ConfigurationError

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def embeddings(model: nn.Module) -> set[Parameter]:
    """Return the weights of embeddings, also where another layer shares them.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        >>> embeddings(model) == {model[0].weight}
        True
    """
    return {p for module in model.modules() if isinstance(module, _EMBEDDINGS) for p in module.parameters(False)}


def norms(model: nn.Module) -> set[Parameter]:
    """Return weights and biases of normalisations.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> norms(model) == {model[1].weight, model[1].bias}
        True
    """
    return {p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}


def last_linear(model: nn.Module) -> set[Parameter]:
    """Return weight and bias of the last linear layer, in the order in which the modules were registered.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(1))
        >>> last_linear(model) == {model[2].weight, model[2].bias}
        True
    """
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return set(found[-1].parameters(False)) if found else set()


def without_decay(model: nn.Module) -> set[Parameter]:
    """Return what usually has no weight decay: norms, embeddings, and whatever has fewer than two dimensions (biases).

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        >>> [name for name, parameter in model.named_parameters() if parameter not in without_decay(model)]
        ['1.weight']
    """
    return {p for p in model.parameters() if p.ndim < 2} | norms(model) | embeddings(model)


def matching(key: str, patterns: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the names that match one of the patterns, in their own order.

    Args:
        key: the config key that holds the patterns, for messages.
        patterns: one or several, as in file names: `*` for anything, `?` for a character, `[ab]` for one of several.
        names: of the parameters there are.

    Raises:
        ConfigurationError: for a pattern that matches nothing.

    Example:
        >>> matching("optimizer.no_decay", "*.bias", ["0.weight", "0.bias", "2.bias"])
        ['0.bias', '2.bias']
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in given:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(str(pattern), names, n=3, cutoff=0.4) or list(names[:3])
            raise ConfigurationError(
                f"{key}: {pattern!r} matches no parameter of the model. Write a name or a pattern such as 'head.*'; "
                f"names there are: {', '.join(near)}, ..."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in given)]
