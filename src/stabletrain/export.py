"""Trained models on their way out: as files that others read, and as modules ready for inference."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stabletrain import __version__
from stabletrain.build import build_model
from stabletrain.config.keys import locate
from stabletrain.errors import ConfigurationError
from stabletrain.folder import fsync_folder, write_whole, yaml_text
from stabletrain.sealed import MANIFEST_NAME, Entry, manifest_text, seal, versions
from stabletrain.weights import CONFIG_NAME, EXPORT_FORMAT, WEIGHTS_NAME, Weights, put_weights, read_weights


def export(run: Path | str, *, checkpoint: str = "best", to: Path | str | None = None) -> str:
    """Write a run's weights as `model.safetensors`, with the config that its model can be built from.

    The weights are the exponential moving average where the run kept one. A tensor with several names is written once;
    the further names are in the file's metadata, as `safetensors.torch.save_model` does it. `manifest.json` holds the
    file's size and hash, by which `load_model` verifies it.

    Args:
        run: the run's folder, or a checkpoint's.
        checkpoint: `best`, `last`, or the name of one, such as `step_000000100`.
        to: the folder to write, which appears as a whole; an earlier export there is replaced. None: `exported` in the
            run's folder.

    Returns:
        What was written, in words.

    Raises:
        ConfigurationError: there is no such checkpoint, it is damaged, or `to` holds something else.
    """
    if to is None and not Path(run, "checkpoints").is_dir():
        raise ConfigurationError(f"{run} is no run's folder with checkpoints; of anything else, give to=<folder> too.")
    folder = Path(to) if to is not None else Path(run) / "exported"
    _refuse_something_else(folder)
    weights = read_weights(run, checkpoint)
    tensors = _separate(weights)
    aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        _write(aside, weights, tensors)
        _replace(folder, aside)
    except OSError as error:
        raise ConfigurationError(
            f"{folder} can't be written: {error}; free space or rights there, or give to=."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{folder / WEIGHTS_NAME}: {_described(weights, tensors)}"


def load_model(
    folder: Path | str,
    checkpoint: str = "best",
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return a trained model, ready for inference: in evaluation mode, with the averaged weights if there are any.

    It is built as the run's config says, by your own class where that names one, without the data. That calls what the
    config names: of a folder that you don't trust, give the `model`, and nothing that the folder names is called.

    Args:
        folder: of a run, a checkpoint or an export; or a `.safetensors` file, with `model`.
        checkpoint: of a run's checkpoints: `best`, `last`, or the name of one.
        model: whose weights are overwritten, instead of one that the config names; needed for runs from Python.
        device: where to put the model.

    Raises:
        ConfigurationError: there are no such weights, they are damaged, or of another model.
    """
    weights = read_weights(folder, checkpoint)
    if model is None:
        model = _built(weights)
    put_weights(model, weights, strict=True, hint="Give the model that was trained as model=.")
    return model.to(device).eval()


def _built(weights: Weights) -> nn.Module:
    settings = weights.settings
    if "model" not in settings:
        raise ConfigurationError(
            f"{weights.origin} doesn't say how its model is built, as with runs from Python; build it and give it: "
            "load_model(..., model=...)."
        )
    locate("model", settings["model"].get("_target_"))  # says what is missing where, better than Hydra
    return build_model(settings)


def _refuse_something_else(folder: Path) -> None:
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if not names <= {WEIGHTS_NAME, CONFIG_NAME, MANIFEST_NAME}:
        raise ConfigurationError(
            f"{folder} holds something else ({', '.join(sorted(names)[:3])}); give to=<new folder>."
        )


def _separate(weights: Weights) -> dict[str, Tensor]:
    """Return each tensor once, with memory of its own and in the order of its elements, as the format wants them."""
    kept = {name: tensor for name, tensor in weights.tensors.items() if name not in weights.tied}
    others = [name for name, tensor in kept.items() if not isinstance(tensor, Tensor)]
    if others:
        raise ConfigurationError(
            f"the model's state holds more than tensors ({', '.join(others)}), which safetensors can't; use load_model "
            "on the checkpoint itself."
        )
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}


def _write(aside: Path, weights: Weights, tensors: dict[str, Tensor]) -> None:
    write_whole(aside / CONFIG_NAME, yaml_text(weights.settings))
    facts = _facts(weights)
    metadata = {"format": "pt", **{name: str(value) for name, value in facts.items()}, **weights.tied}
    try:
        save_file(tensors, aside / WEIGHTS_NAME, metadata)
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"safetensors can't hold these weights: {error}.") from error
    os.chmod(aside / WEIGHTS_NAME, (aside / CONFIG_NAME).stat().st_mode)  # the library writes for the owner alone
    files: dict[str, Entry] = {WEIGHTS_NAME: seal(aside / WEIGHTS_NAME)}
    manifest: dict[str, Any] = {"format": EXPORT_FORMAT, **facts, "tied": weights.tied, "versions": versions()}
    write_whole(aside / MANIFEST_NAME, manifest_text({**manifest, "files": files}))
    fsync_folder(aside)


def _facts(weights: Weights) -> dict[str, Any]:
    facts: dict[str, Any] = {"stabletrain": __version__, "checkpoint": weights.origin.name}
    if weights.checkpoint is not None:
        facts |= {"updates": weights.checkpoint.updates, "metrics": weights.checkpoint.metrics}
    return {**facts, "averaged": weights.averaged}


def _replace(folder: Path, aside: Path) -> None:
    old = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _described(weights: Weights, tensors: dict[str, Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    text = f"{weights}, {len(tensors)} tensors, {numbers:,} numbers"
    if weights.tied:
        text += f"; written once: {', '.join(f'{alias} = {name}' for alias, name in weights.tied.items())}"
    return text
