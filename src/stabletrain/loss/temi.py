"""TEMI: clustering by the mutual information of the cluster assignments of two views, taught by a slower copy."""

from __future__ import annotations

from typing import Any

import torch

from stabletrain.checks import number, whole
from stabletrain.errors import ConfigurationError
from stabletrain.loss.base import Loss, Values, wide
from stabletrain.loss.probability import log_softmax

LEAST_STUDENT_TEMPERATURE, LEAST_TEACHER_TEMPERATURE = 0.05, 0.04
LEAST_SHARE = 1e-12  # of a cluster, so that its logarithm is finite
LARGEST_LOGIT = 65504.0  # of a healthy head: what float16 holds, so that a head is bad in every format or in none


class TEMI(Loss):
    """TEMI: `-w log sum_c (q_c p_c)^beta / m_c`, in log space, the mean over heads and ordered pairs of views.

    p is the student's softmax of one view, q the teacher's of another; m_c is the running mean of the teacher's q_c;
    the weight `w = mean over heads and pairs of views of sum_c q_c q'_c` is how far the teacher agrees with itself
    about the sample. The teacher has no gradient: let the model return it from a copy of its heads that follows them
    slowly.

    Called with the pair (student, teacher) of logits, or a dictionary with these names, each [B, V, H, C] for V views,
    H heads and C clusters, or [B, V, C] for one head. Targets aren't looked at.

    Each sample's loss depends on the others through m alone. m moves with each microbatch in training, as running
    statistics do: it is in checkpoints, and a rejected step leaves no trace in it. Of several processes the first one's
    m counts.

    Args:
        num_classes: number of clusters C.
        heads: number of heads H.
        beta: exponent, from 0.5 to 1: 0.5 to 0.6 keeps clusters of even size, at 1 they may collapse.
        student_temperature: at least 0.05.
        teacher_temperature: at least 0.04; lower than the student's, so that the teacher is surer.
        momentum: share of m that stays at each microbatch, from 0 to below 1.
        teacher_weighting: false: every sample has w = 1.
        leave_out_bad_heads: true: a head with NaN, Inf or more than 65504 (float16's range) in a microbatch's logits is
            left out, and the mean is over the others; false: it makes the step bad, which the guard sees. Where every
            head is bad, it is the samples: none is left out, and the guard sees the step.

    References:
        N. Adaloglou, F. Michels, H. Kalisch, M. Kollmann: Exploring the Limits of Deep Image Clustering using
        Pretrained Models, 2023 (beta 0.6, student temperature 0.1).

    Example:
        >>> certain = torch.tensor([[[5.0, 0.0], [5.0, 0.0]], [[0.0, 5.0], [0.0, 5.0]]])
        >>> TEMI(num_classes=2)((certain, certain), None)[0]
        tensor([-0.6931, -0.6931])
    """

    tasks = ("supervised", "clustering")
    marginal: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        heads: int = 1,
        beta: float = 0.6,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        momentum: float = 0.9,
        teacher_weighting: bool = True,
        leave_out_bad_heads: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.heads = num_classes, heads
        for name, count, least in (("num_classes", num_classes, 2), ("heads", heads, 1)):
            whole(name, count, least)
        if not isinstance(beta, (int, float)) or not 0.5 <= beta <= 1:
            raise ConfigurationError(f"beta is {beta!r}; a number from 0.5 to 1 is allowed.")
        self.beta = float(beta)
        self.student_temperature = number("student_temperature", student_temperature, least=LEAST_STUDENT_TEMPERATURE)
        self.teacher_temperature = number("teacher_temperature", teacher_temperature, least=LEAST_TEACHER_TEMPERATURE)
        self.momentum = number("momentum", momentum, below=1.0)
        self.teacher_weighting, self.leave_out_bad_heads = teacher_weighting, leave_out_bad_heads
        self.register_buffer("marginal", torch.full((heads, num_classes), 1 / num_classes))

    def forward(self, outputs: Any, targets: Any = None) -> Values:
        """Return the loss of each sample, and no weights; in training the marginal moves first."""
        losses, healthy = self._of_heads(outputs)
        return _mean_over(healthy, losses), None

    def per_head(self, outputs: Any) -> torch.Tensor:
        """Return the loss of each sample by each head [B, H], as in evaluation; NaN for a head that is left out."""
        losses, healthy = self._of_heads(outputs, moves=False)
        return torch.where(healthy, losses, torch.nan)

    def assignments(self, outputs: Any) -> torch.Tensor:
        """Return the cluster that each head's teacher finds most probable for the first view, int64 [B, H]."""
        return self._logits(outputs)[1][:, 0].argmax(-1)

    def _of_heads(self, outputs: Any, *, moves: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each sample by each head [B, H], and which heads count [H]."""
        student, teacher = self._logits(outputs)
        healthy = torch.ones(student.shape[2], dtype=torch.bool, device=student.device)
        if self.leave_out_bad_heads:
            healthy = _usable_heads(student) & _usable_heads(teacher)
            healthy = healthy | ~healthy.any()
            student, teacher = (torch.where(healthy[:, None], part, 0.0) for part in (student, teacher))
        log_p = _log_softmax(student, self.student_temperature)
        log_q = _log_softmax(teacher, self.teacher_temperature)
        if moves and self.training and len(teacher) > 0:
            self._move(torch.exp(log_q).mean((0, 1)), healthy)
        log_share = self.marginal.to(log_p).clamp_min(LEAST_SHARE).log()
        views = range(student.shape[1])
        pairs = [(v, w) for v in views for w in views if v != w]
        losses = -torch.stack(
            [torch.logsumexp(self.beta * (log_p[:, v] + log_q[:, w]) - log_share, -1) for v, w in pairs]
        ).mean(0)
        if self.teacher_weighting:
            agreement = torch.stack([torch.exp(log_q[:, v] + log_q[:, w]).sum(-1) for v, w in pairs if v < w]).mean(0)
            losses = losses * _mean_over(healthy, agreement)[:, None]
        return losses, healthy

    @torch.no_grad()
    def _move(self, share: torch.Tensor, healthy: torch.Tensor) -> None:
        moved = self.momentum * self.marginal + (1 - self.momentum) * share.to(self.marginal)
        self.marginal.copy_(torch.where(healthy[:, None], moved, self.marginal))

    def _logits(self, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both logits as [B, V, H, C], the teacher's without history."""
        if isinstance(outputs, dict):
            outputs = (outputs.get("student"), outputs.get("teacher"))
        heads, classes = self.marginal.shape
        parts = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        for place, part in enumerate(parts):
            if isinstance(part, torch.Tensor) and part.dim() == 3:
                parts[place] = part.unsqueeze(2)
        fit = [
            isinstance(part, torch.Tensor)
            and part.dim() == 4
            and part.shape[1] >= 2
            and part.shape[2:] == (heads, classes)
            for part in parts
        ]
        if len(parts) != 2 or not all(fit) or parts[0].shape != parts[1].shape:
            given = ", ".join(str(list(p.shape)) if isinstance(p, torch.Tensor) else type(p).__name__ for p in parts)
            raise ConfigurationError(
                f"the model returned {given}; TEMI needs the pair (student, teacher), each [samples, views, heads, "
                f"classes] = [B, 2 or more, {heads}, {classes}] (loss.heads, loss.num_classes)."
            )
        return wide(parts[0]), wide(parts[1].detach())


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log p over the last dimension; the largest logit is taken off first, where the difference is exact."""
    sharpened = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    return log_softmax(sharpened.flatten(0, -2)).view(logits.shape)


def _usable_heads(logits: torch.Tensor) -> torch.Tensor:
    return (logits.abs() <= LARGEST_LOGIT).all(-1).flatten(0, 1).all(0)


def _mean_over(healthy: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean over the healthy heads of [B, H]; 0 where there is none."""
    return torch.where(healthy, values, 0.0).sum(1) / healthy.sum().clamp_min(1)
