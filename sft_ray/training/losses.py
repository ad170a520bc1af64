"""One loss per item, for every kind of task; what is right lies in `tasks.TASKS`.

Shapes: logits are [n, classes] per item and [n, length, classes] per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sft_ray.training.examples import IGNORED


@dataclass(frozen=True)
class LossOptions:
    """What classification losses can be changed by; `class_weights` is [classes]."""

    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None


# Logits, labels and the mask of real tokens [n, length] to one loss per item, [n].
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossOptions], torch.Tensor]


def cross_entropy(
    logits_NC: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Of class ids [n] or probabilities [n, classes]; [n].

    Label smoothing as in Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016.
    """
    return F.cross_entropy(
        logits_NC,
        labels if labels.ndim == 1 else labels.to(logits_NC.dtype),
        weight=_weights(options, logits_NC),
        label_smoothing=options.label_smoothing,
        reduction="none",
    )


def token_cross_entropy(
    logits_NLC: torch.Tensor, labels_NL: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Summed over the labelled tokens of each item, [n]."""
    losses_NL = F.cross_entropy(
        logits_NLC.transpose(1, 2),
        labels_NL,
        weight=_weights(options, logits_NLC),
        ignore_index=IGNORED,
        label_smoothing=options.label_smoothing,
        reduction="none",
    )
    return losses_NL.sum(dim=1)


def binary_cross_entropy(
    logits_NC: torch.Tensor, labels_NC: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Mean over the classes of each item, [n]."""
    targets = labels_NC.to(logits_NC.dtype)
    return F.binary_cross_entropy_with_logits(logits_NC, targets, reduction="none").mean(dim=1)


def squared_error(
    logits_N1: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """(output - value)^2, [n]."""
    return (logits_N1.squeeze(1) - labels.to(logits_N1.dtype)).square()


def span_cross_entropy(
    logits_NL2: torch.Tensor, labels_N2: torch.Tensor, mask: torch.Tensor, options: LossOptions
) -> torch.Tensor:
    """Mean of the cross-entropies of start and end over the real tokens, [n].

    Padding is left out, so that the loss does not depend on what an item is batched with.
    """
    logits_NL2 = logits_NL2.masked_fill(~mask[:, :, None], torch.finfo(logits_NL2.dtype).min)
    return F.cross_entropy(logits_NL2, labels_N2, reduction="none").mean(dim=1)


def _weights(options: LossOptions, logits: torch.Tensor) -> torch.Tensor | None:
    return None if options.class_weights is None else options.class_weights.to(logits)
