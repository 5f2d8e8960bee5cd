"""A recurrent classifier for sequences of different length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from stabletrain.errors import ConfigurationError


class RecurrentClassifier(nn.Module):
    """An LSTM over each sequence, the mean of its outputs over the sequence's own time steps, and a linear layer.

    Sequences come in any order of length; what one yields doesn't depend on the length of the others.

    Args:
        in_features: features per time step.
        num_classes: number of logits.
        hidden: width of the LSTM.
        layers: number of LSTM layers.
        dropout: share of values set to 0 between LSTM layers and before the linear layer, from 0 to below 1.

    Example:
        >>> RecurrentClassifier(in_features=2, num_classes=3)([torch.zeros(5, 2), torch.zeros(9, 2)]).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: int = 64, layers: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.recurrent = nn.LSTM(in_features, hidden, num_layers=layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, sequences: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Return the logits of some sequences.

        Args:
            sequences: list of B tensors [length, in_features], or one tensor [B, length, in_features].

        Returns:
            Logits [B, num_classes].

        Raises:
            ConfigurationError: for a sequence without a time step.
        """
        lengths = [len(sequence) for sequence in sequences]
        if 0 in lengths:
            raise ConfigurationError(
                f"the sequence at place {lengths.index(0)} of the batch has no time step: leave such samples out of "
                "the data."
            )
        padded = sequences if isinstance(sequences, torch.Tensor) else pad_sequence(list(sequences), batch_first=True)
        # The padding comes after a sequence's own steps, so that it can't reach the outputs that count.
        outputs, _ = self.recurrent(padded)
        counts = torch.tensor(lengths).to(padded.device, non_blocking=True).unsqueeze(1)
        padding = torch.arange(padded.shape[1], device=padded.device) >= counts
        total = outputs.float().masked_fill(padding.unsqueeze(2), 0.0).sum(1)
        logits: torch.Tensor = self.classifier(self.dropout(total / counts))
        return logits
