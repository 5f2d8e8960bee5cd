"""Items for users: trained on pairs, judged by where held-out items stand among all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.task.base import AdditiveTask, Output, parts, share
from stabletrain.task.ranks import Ranks, without


class Recommendation(AdditiveTask):
    """Items for users; reports loss, Recall and NDCG at 20 among all items, and the Recall of cold items.

    To train, the data is a dictionary whose `weight` [B] each sample's loss is multiplied with, and the model returns
    the scores of what was chosen [B] and of what wasn't [B, N]. To evaluate, the data is the pair of such a dictionary
    and the targets `held_out` int64 [B, H], `known` int64 [B, K] (both filled up with -1) and `cold` bool [B, H]; the
    model returns the scores of all items [B, items]. Known items are left out of the ranking. A sample is a user, and
    metrics are means over users; `cold_recall_at_20` over those who have a cold item among the held-out ones (0 where
    nobody has), which is ranked among all items, too.

    The loss of a user in evaluation is the mean over the held-out items, each compared with all items that are neither
    held out nor known.

    Args:
        loss: called with the scores of what was chosen [n] and of what wasn't [n, N], of which it takes a mean; 0 for
            one at -Inf.
        top: how many items are shown to a user; the metrics are named after it.
        chunk: users ranked at a time; it bounds the memory.

    Raises:
        ConfigurationError: for numbers below 1, and for another loss.

    Example:
        >>> from stabletrain.loss import BPR
        >>> data = {"weight": torch.tensor([1.0, 3.0])}
        >>> model = lambda batch: (torch.tensor([0.0, 1.0]), torch.zeros(2, 4))
        >>> model.training = True
        >>> output = Recommendation(BPR()).step(model, data)
        >>> output.weight, output.per_sample_loss
        (tensor(4.), tensor([0.6931, 0.3133]))
    """

    name = "recommendation"
    counts = 4

    def __init__(self, loss: nn.Module, top: int = 20, chunk: int = 256) -> None:
        super().__init__(loss)
        for name, number in (("top", top), ("chunk", chunk)):
            whole(f"task.{name}", number)
        self.top, self.chunk = top, chunk

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss of one microbatch.

        Args:
            model: from the inputs to the scores of what was chosen and of what wasn't.
            data: the inputs, or a pair of which the first are; `weight` [B] is among them.

        Raises:
            ConfigurationError: for data without weights.
        """
        inputs, _ = parts(data)
        if not isinstance(inputs, dict) or "weight" not in inputs:
            raise ConfigurationError(
                "task=recommendation trains on dictionaries with user, item, negatives and weight; choose data=tastes "
                "or data=interactions, or give such a dictionary."
            )
        return super().step(model, (inputs, inputs["weight"]))

    def _losses(self, outputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(targets, torch.Tensor):  # the weights of a microbatch to train on
            return self.loss(outputs, None)[0], targets
        return self._of_held_out(outputs, targets["held_out"], targets["known"]), None

    def _of_held_out(self, scores: torch.Tensor, held_out: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Return each user's mean loss over the held-out items, [B]."""
        others = without(without(scores, known), held_out)
        number = (others != -torch.inf).sum(1)
        wider = others.shape[1] / number.clamp_min(1).double()  # the loss's mean is over all columns
        total = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
        for column in held_out.unbind(1):
            chosen = scores.gather(1, column.clamp_min(0).unsqueeze(1)).squeeze(1)
            values, _ = self.loss((chosen, others), None)
            total += torch.where(column >= 0, values.double() * wider, 0.0)
        return total / (held_out >= 0).sum(1).clamp_min(1)

    def _counted(self, outputs: Any, targets: Any) -> Sequence[torch.Tensor]:
        ranks = Ranks.among_all(outputs, targets["held_out"], targets["known"], self.chunk)
        cold = targets["cold"]
        measures = ranks.recall(self.top), ranks.ndcg(self.top), ranks.recall(self.top, cold), cold.any(1)
        return [measure.double().sum() for measure in measures]

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        recall, ndcg, cold_recall, with_cold = counted
        return {
            f"recall_at_{self.top}": recall / samples,
            f"ndcg_at_{self.top}": ndcg / samples,
            f"cold_recall_at_{self.top}": share(cold_recall, with_cold),
        }
