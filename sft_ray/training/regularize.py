"""Penalties lambda R(theta) on trained weights, added as gradients without a second graph.

R(theta) is sum |theta| for l1, sum theta^2 / 2 for l2 and sum (theta - theta_0)^2 / 2 for l2_sp
with theta_0 the pretrained value, 0 for weights the checkpoint lacks or that begin anew (Li,
Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018).
Decoupled weight decay is the optimiser's and no penalty here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sft_ray.config import Regularization
from sft_ray.training.model import Pretrained


def is_penalized(parameter: nn.Parameter) -> bool:
    """Matrices are; biases and normalisation weights, which are vectors, are not."""
    return parameter.ndim >= 2


@dataclass(frozen=True)
class Penalty:
    """A penalty bound to the weights it acts on.

    Attributes:
        anchors: theta_0 of each weight, for l2_sp only.
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
        if self.kind == "l1":
            directions = torch._foreach_sign(self.weights)
        elif self.kind == "l2":
            directions = tuple(self.weights)
        else:
            directions = torch._foreach_sub(self.weights, self.anchors)
        torch._foreach_add_(gradients, directions, alpha=self.strength)

    @torch.no_grad()
    def value(self) -> float:
        """lambda R(theta)."""
        if not self.weights:
            return 0.0
        if self.kind == "l1":
            return self.strength * sum(float(w.abs().sum()) for w in self.weights)
        differences = (
            self.weights if self.kind == "l2" else torch._foreach_sub(self.weights, self.anchors)
        )
        return self.strength * sum(float(d.square().sum()) / 2 for d in differences)


def bind_penalty(regularization: Regularization, pretrained: Pretrained) -> Penalty:
    """The penalty over the weights that this trial trains; empty for none and weight_decay."""
    kind, strength = regularization.kind, regularization.strength
    if kind in ("none", "weight_decay") or not strength:
        return Penalty(kind, 0.0, [], [])
    named = {n: p for n, p in pretrained.trainable().items() if is_penalized(p)}
    anchors = []
    if kind == "l2_sp":
        unlearned = pretrained.from_scratch | pretrained.reinitialized
        anchors = [
            torch.zeros_like(p) if n in unlearned else pretrained.pristine[n]
            for n, p in named.items()
        ]
    return Penalty(kind, strength, list(named.values()), anchors)
