"""`sft-ray predict --explain`: how much each token spoke for the answer.

Integrated gradients (Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML
2017) from a baseline in which every token but the special ones is padding.  Their sum is what the
answer's raw output is above the baseline's (completeness), up to `gap`, which is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from sft_ray.errors import ConfigError
from sft_ray.serving.predict import ROWS_AT_ONCE, Predictor
from sft_ray.training import batches
from sft_ray.training.metrics import Floats

POINTS = (16, 32, 64, 128, 256)  # on the path; more until the gap is small
POINTS_AT_ONCE = 16
ALLOWED_GAP = 0.01  # of the difference between input and baseline


def explained(predictor: Predictor, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answers as `predict` gives them, each with an `explanation` of its highest output.

    Raises:
        ConfigError: the task answers per token.
        DataError: a row that cannot be read.
    """
    if predictor.task.per_token:
        raise ConfigError(
            f"--explain: {predictor.task.name} answers per token; tasks with one answer per input "
            "can be explained"
        )
    rows, start = iter(rows), 0
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        examples = predictor.encode(predictor.checked(chunk, start))
        outputs = predictor.outputs(examples)
        answers = predictor.task.answer(outputs, examples, predictor.label_set)
        for item, answer in enumerate(answers):
            inputs = batches.collate(
                examples,
                np.array([item]),
                pad_token=predictor.encoder.tokenizer.pad_token_id,
                device=predictor.world.device,
                with_labels=False,
            ).inputs
            yield {**answer, "explanation": _explain(predictor, inputs, outputs[item])}
        start += len(chunk)


def _explain(
    predictor: Predictor, inputs: dict[str, torch.Tensor], outputs_C: Floats
) -> dict[str, Any]:
    target = int(outputs_C.argmax())
    tokenizer, ids = predictor.encoder.tokenizer, inputs["input_ids"][0].tolist()
    for num_points in POINTS:
        scores_L, found, baseline = attributions(predictor, inputs, target, num_points)
        gap = found - baseline - float(scores_L.sum())
        if abs(gap) <= ALLOWED_GAP * abs(found - baseline):
            break
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    names = predictor.label_set.names
    return {
        "of": names[target] if names else "value",
        "output": found,
        "baseline": baseline,
        "gap": gap,
        "tokens": [
            [tokenizer.decode([token]).strip(), float(score)]
            for token, score in zip(ids, scores_L, strict=True)
            if token not in special
        ],
    }


def attributions(
    predictor: Predictor, inputs: dict[str, torch.Tensor], target: int, num_points: int
) -> tuple[Floats, float, float]:
    """Of one raw output of one input: per token [length], the output, and the baseline's.

    Args:
        inputs: tensors [1, length].
        num_points: of the Gauss-Legendre rule along the path.
    """
    model, tokenizer = predictor.model, predictor.encoder.tokenizer
    model.eval()
    ids_1L = inputs["input_ids"]
    special = torch.tensor(tokenizer.all_special_ids, device=ids_1L.device)
    unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    stays = torch.isin(ids_1L, special) & (ids_1L != unknown)
    with torch.no_grad():
        embed = model.get_input_embeddings()
        end_1LD = embed(ids_1L)
        start_1LD = embed(ids_1L.where(stays, tokenizer.pad_token_id))
    nodes, weights = np.polynomial.legendre.leggauss(num_points)
    shares, weights = (nodes + 1) / 2, weights / 2
    summed_LD = torch.zeros_like(end_1LD[0])
    for first in range(0, num_points, POINTS_AT_ONCE):
        part = slice(first, first + POINTS_AT_ONCE)
        share_P11 = torch.tensor(shares[part], dtype=end_1LD.dtype, device=ids_1L.device)
        share_P11 = share_P11[:, None, None]
        points_PLD = (start_1LD + share_P11 * (end_1LD - start_1LD)).requires_grad_()
        outputs_P = _outputs_at(model, inputs, points_PLD)[:, target]
        (gradient_PLD,) = torch.autograd.grad(outputs_P.sum(), points_PLD)
        weight_P = torch.tensor(weights[part], dtype=end_1LD.dtype, device=ids_1L.device)
        summed_LD += torch.einsum("p,pld->ld", weight_P, gradient_PLD)
    scores_L = ((end_1LD - start_1LD)[0] * summed_LD).sum(dim=-1)
    with torch.no_grad():
        both = _outputs_at(model, inputs, torch.cat([end_1LD, start_1LD]))[:, target].tolist()
    return scores_L.cpu().numpy(), both[0], both[1]


def _outputs_at(
    model: Any, inputs: dict[str, torch.Tensor], embeddings_PLD: torch.Tensor
) -> torch.Tensor:
    """Raw outputs [points, classes] where the word embeddings are these.

    A hook replaces them, so that every family finds its positions as it always does.
    """
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeddings_PLD)
    try:
        expanded = {k: v.expand(len(embeddings_PLD), -1) for k, v in inputs.items()}
        logits: torch.Tensor = model(**expanded).logits
        return logits
    finally:
        handle.remove()
