"""A bidirectional recurrent classifier with attention pooling, for windows of a multivariate series."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from stabletrain.model.pooling import AttentionPooling


class DirectionClassifier(nn.Module):
    """A bidirectional LSTM over the window, attention pooling over its time steps, and the layer `direction_logits`.

    The recurrent matrices begin orthogonal in each gate, the forget gates' biases at 1: what the network remembers
    neither grows nor fades at first.

    Args:
        in_features: features per time step.
        num_classes: number of logits.
        hidden: width of the LSTM in each direction.
        layers: number of LSTM layers.
        attention: width of the network that scores time steps.
        dropout: share of values set to 0 between LSTM layers and before the last layer, from 0 to below 1.
        clamp: attention scores are kept from -clamp to clamp; None = no limit.

    References:
        A. Saxe, J. McClelland, S. Ganguli: Exact solutions to the nonlinear dynamics of learning, 2014 (orthogonal).
        R. Jozefowicz, W. Zaremba, I. Sutskever: An Empirical Exploration of Recurrent Network Architectures, 2015.

    Example:
        >>> DirectionClassifier(in_features=5, num_classes=3, hidden=8)(torch.zeros(2, 60, 5)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 32,
        layers: int = 1,
        attention: int = 32,
        dropout: float = 0.3,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.recurrent = nn.LSTM(
            in_features, hidden, num_layers=layers, batch_first=True, dropout=between, bidirectional=True
        )
        self.pooling = AttentionPooling(2 * hidden, attention, clamp)
        self.dropout = nn.Dropout(dropout)
        self.direction_logits = nn.Linear(2 * hidden, num_classes)
        for name, parameter in self.recurrent.named_parameters():
            if name.startswith("weight_hh"):
                for gate in torch.split(parameter.data, hidden):
                    nn.init.orthogonal_(gate)
            elif name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):  # the two biases are added: one of them is enough
                    parameter.data[hidden : 2 * hidden] = 1.0

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return logits [B, num_classes] of windows [B, T, in_features]."""
        # On a CPU torch has no LSTM in float16: there the recurrence alone is computed in float32.
        device = windows.device.type
        half = device == "cpu" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.half
        with torch.autocast(device, enabled=False) if half else nullcontext():
            states, _ = self.recurrent(windows)
        logits: torch.Tensor = self.direction_logits(self.dropout(self.pooling(states)))
        return logits
