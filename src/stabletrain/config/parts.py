"""Options made of others of their group, by name: `augmentation.parts=[random_crop_flip, {noise: {std: 0.1}}]`."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from stabletrain.config.places import conf_folder, option_names
from stabletrain.config.words import did_you_mean
from stabletrain.errors import ConfigurationError

COMPOSED = ("augmentation",)  # groups with an option that takes `parts`


def with_parts(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with each name in a composition's `parts` replaced by what that option says.

    Args:
        values: resolved, plain settings; they stay as they are.

    Raises:
        ConfigurationError: a part is no name of an option, and no dictionary with a `_target_`.

    Example:
        >>> with_parts({"augmentation": {"parts": [{"noise": {"std": 0.5}}]}})["augmentation"]["parts"]
        [{'_target_': 'stabletrain.augmentation.Noise', 'std': 0.5}]
    """
    result = dict(values)
    for group in COMPOSED:
        node = values.get(group)
        if isinstance(node, dict) and isinstance(node.get("parts"), list):
            parts = [_part(f"{group}.parts[{position}]", group, item) for position, item in enumerate(node["parts"])]
            result[group] = {**node, "parts": parts}
    return result


def _part(path: str, group: str, item: Any) -> dict[str, Any]:
    if isinstance(item, dict) and "_target_" in item:
        return item
    name, keys = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
    allowed = [option for option in option_names(group) if option != "composition"]
    if name not in allowed or not isinstance(keys, dict):
        raise ConfigurationError(
            f"{path} is {item!r}; a part is the name of an option ({', '.join(allowed)}), such as noise, with keys of "
            f"its own as {{noise: {{std: 0.1}}}}, or a dictionary with a _target_.{did_you_mean(str(name), allowed)}"
        )
    option = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{name}.yaml"))
    assert isinstance(option, dict)
    return {**{str(key): value for key, value in option.items()}, **keys}
