"""What faults do to Lightning, Hugging Face and Accelerate, without and with the guard, and what the guard costs there.

    python benchmarks/integrations.py [--faults] [--speed] [--epochs 8] [--turns 15]

Needs what `make test-integrations` installs. The network and the data are the digits of scikit-learn; without the guard
each library clips by its own means, at the same norm. Seconds per step are the CPU time between two forward
passes, the median over a training; trainings with and without the guard take turns in one process of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))

from throughput import ratio

from stabletrain.data import digits
from stabletrain.integrations import huggingface
from stabletrain.integrations import lightning as guarded_lightning
from stabletrain.integrations.accelerate import guarded
from stabletrain.model import ConvNet

BATCH, MAX_NORM, RATE = 64, 1.0, 1e-3
FAULTS = ("none", "nan_input", "nan_loss", "inf_gradient", "large_input")


class Infinite(torch.autograd.Function):
    """The identity, whose gradient is Inf."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the values."""
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return Inf."""
        return gradient * math.inf


class Network(nn.Module):
    """A network with its loss, one of whose forward passes in training goes wrong."""

    def __init__(self, body: nn.Module, fault: str = "none", at: int = 0) -> None:
        super().__init__()
        self.body = body
        self.fault, self.at = fault, at
        self.times: list[float] = []

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        fault = self.fault if self.training and len(self.times) == self.at else "none"
        if self.training:
            self.times.append(time.process_time())
        if fault == "nan_input":
            inputs = inputs.clone()
            inputs[0] = math.nan
        if fault == "large_input":
            inputs = inputs * 1e4  # batch normalisation hides it from loss and gradients
        logits = self.body(inputs)
        loss = F.cross_entropy(logits, labels)
        if fault == "nan_loss":
            loss = loss * math.nan
        if fault == "inf_gradient":
            loss = Infinite.apply(loss)
        return {"loss": loss, "logits": logits}

    def seconds(self) -> float:
        """Return the median time between two forward passes, without the first ones."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[10:]))


class Samples(Dataset[Any]):
    """Images and labels as dictionaries."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Module(lightning.LightningModule):
    """As a user writes it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Return the loss."""
        return self.network(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=RATE)


def with_lightning(network: Network, data: Samples, epochs: int, guard: bool) -> None:
    """Train with Lightning."""
    clipping: dict[str, Any] = {"gradient_clip_val": MAX_NORM}
    if guard:
        clipping = {"callbacks": [guarded_lightning.GuardCallback(max_norm=MAX_NORM)]}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **clipping,
    )
    trainer.fit(Module(network), DataLoader(data, BATCH, shuffle=True))


def with_huggingface(network: Network, data: Samples, epochs: int, guard: bool) -> None:
    """Train with Hugging Face's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            max_grad_norm=0.0 if guard else MAX_NORM,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        callbacks = [huggingface.GuardCallback(max_norm=MAX_NORM)] if guard else []
        trainer = transformers.Trainer(network, arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def with_accelerate(network: Network, data: Samples, epochs: int, guard: bool) -> None:
    """Train with a loop written with Accelerate."""
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()
    accelerator = Accelerator(cpu=True)
    optimizer: Any = torch.optim.AdamW(network.parameters(), lr=RATE)
    model, optimizer, loader = accelerator.prepare(network, optimizer, DataLoader(data, BATCH, shuffle=True))
    watching = guarded(accelerator, model, optimizer, max_norm=MAX_NORM) if guard else None
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch)["loss"]
            if watching is not None:
                watching.observe(loss)
            accelerator.backward(loss)
            if watching is None:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()


LIBRARIES: dict[str, Callable[[Network, Samples, int, bool], None]] = {
    "Lightning": with_lightning,
    "Hugging Face": with_huggingface,
    "Accelerate": with_accelerate,
}


def convnet() -> nn.Module:
    """Build the digits' network."""
    return ConvNet(in_channels=1, num_classes=10, image_size=(8, 8))


def perceptron() -> nn.Module:
    """Build a network so small that overhead is all."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train(library: str, body: Callable[[], nn.Module], fault: str, at: int, epochs: int, guard: bool) -> Network:
    """Train and return the network."""
    torch.manual_seed(0)
    network = Network(body(), fault, at)
    data = digits(seed=0).train
    LIBRARIES[library](network, Samples(data.inputs, data.targets), epochs, guard)
    return network.to("cpu")


def faults(epochs: int) -> None:
    """Print what is left after a fault one epoch before the end."""
    validation = digits(seed=0).validation
    steps = math.ceil(len(digits(seed=0).train) / BATCH)
    print("| library | fault | without: survived, finite, accuracy | with the guard: survived, finite, accuracy |")
    print("| --- | --- | --- | --- |")
    for library, fault in itertools.product(LIBRARIES, FAULTS):
        cells = []
        for guard in (False, True):
            try:
                network = train(library, convnet, fault, (epochs - 1) * steps, epochs, guard)
            except Exception as problem:
                cells.append(f"no: {type(problem).__name__}")
                continue
            network.eval()
            finite = all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values())
            with torch.no_grad():
                logits = network.body(validation.inputs)
            accuracy = float((logits.argmax(1) == validation.targets).float().mean())
            cells.append(f"yes, {'yes' if finite else '**no**'}, {accuracy:.3f}")
        print(f"| {library} | `{fault}` | {cells[0]} | {cells[1]} |", flush=True)


def speed(epochs: int, turns: int) -> None:
    """Print the ratio of step times with the guard and without."""
    print("| library | network | CPU ms a step without | time with the guard against without [95 %] |")
    print("| --- | --- | --- | --- |")
    for library, body in itertools.product(LIBRARIES, (convnet, perceptron)):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(turns + 1):
            for guard in random.sample([False, True], 2):
                network = train(library, body, "none", 0, epochs, guard)
                if turn > 0:  # the first one warms up
                    seconds[guard].append(network.seconds())
        value, low, high = ratio(seconds[True], seconds[False])
        middle = statistics.median(seconds[False]) * 1e3
        print(f"| {library} | {body.__name__} | {middle:.2f} | {value:.3f} [{low:.3f}, {high:.3f}] |", flush=True)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", action="store_true", help="only what faults do")
    parser.add_argument("--speed", action="store_true", help="only what the guard costs")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.faults or not arguments.speed:
        faults(arguments.epochs)
    if arguments.speed or not arguments.faults:
        speed(max(1, arguments.epochs // 4), arguments.turns)


if __name__ == "__main__":
    main()
