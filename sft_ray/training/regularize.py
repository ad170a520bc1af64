"""Penalties lambda R(theta) on trained weights, added as gradients without a second graph.

R(theta) is sum |theta| for l1, sum theta^2 / 2 for l2 and sum (theta - theta_0)^2 / 2 for l2_sp
with theta_0 the pretrained value, 0 for weights the checkpoint lacks or that begin anew (Li,
Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018).
Decoupled weight decay is the optimiser's and no penalty here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sft_ray.config import Regularization
from sft_ray.training.model import Pretrained


def is_penalized(parameter: nn.Parameter) -> bool:
    """Matrices are; biases and normalisation weights, which are vectors, are not."""
    return parameter.ndim >= 2


Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Kind:
    """R(theta) of one kind of penalty.

    Attributes:
        value: of a weight, or of its distance from theta_0 where the kind is anchored.
        gradients: of many of them.
        anchored: whether theta_0 is the pretrained value instead of 0.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    gradients: Callable[[Tensors], Tensors]
    anchored: bool = False


# Named in `config.Regularization`.
KINDS = {
    "l1": Kind(lambda weight: weight.abs().sum(), torch._foreach_sign),
    "l2": Kind(lambda weight: weight.square().sum() / 2, tuple),
    "l2_sp": Kind(lambda distance: distance.square().sum() / 2, tuple, anchored=True),
}


@dataclass(frozen=True)
class Penalty:
    """A penalty bound to the weights it acts on.

    Attributes:
        anchors: theta_0 of each weight, for anchored kinds only.
    """

    kind: str
    strength: float
    weights: list[torch.Tensor]
    anchors: list[torch.Tensor]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add lambda dR/dtheta to the gradients, once per step, after all-reduce and unscaling."""
        if not self.weights:
            return
        gradients = [w.grad for w in self.weights if w.grad is not None]
        assert len(gradients) == len(self.weights), "a trained weight has no gradient"
        directions = KINDS[self.kind].gradients(self._penalized())
        torch._foreach_add_(gradients, directions, alpha=self.strength)

    @torch.no_grad()
    def value(self) -> float:
        """lambda R(theta)."""
        if not self.weights:
            return 0.0
        value = KINDS[self.kind].value
        return self.strength * sum(float(value(one)) for one in self._penalized())

    def _penalized(self) -> Tensors:
        if KINDS[self.kind].anchored:
            return torch._foreach_sub(self.weights, self.anchors)
        return tuple(self.weights)


def bind_penalty(regularization: Regularization, pretrained: Pretrained) -> Penalty:
    """The penalty over the weights that this trial trains; empty for none and weight_decay."""
    kind, strength = regularization.kind, regularization.strength
    if kind not in KINDS or not strength:
        return Penalty(kind, 0.0, [], [])
    named = {n: p for n, p in pretrained.trainable().items() if is_penalized(p)}
    anchors = []
    if KINDS[kind].anchored:
        unlearned = pretrained.from_scratch | pretrained.reinitialized
        anchors = [
            torch.zeros_like(p) if n in unlearned else pretrained.pristine[n]
            for n, p in named.items()
        ]
    return Penalty(kind, strength, list(named.values()), anchors)
