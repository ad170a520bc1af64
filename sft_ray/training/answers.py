"""From the outputs of a whole split to one answer per row, as `predict` writes it.

Outputs are [n, classes] for tasks that answer per item, [total, classes] for those that answer per
token, with the tokens of all items end to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sft_ray.tags import with_prefixes
from sft_ray.training.examples import Examples, LabelSet
from sft_ray.training.metrics import Floats

MAX_ANSWER_TOKENS = 64


def answer_classes(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    from scipy.special import softmax

    probabilities = softmax(logits.astype(np.float64), axis=1)
    best = probabilities.argmax(axis=1)
    return [
        {"label": label_set.names[i], "probability": float(row[i])}
        for i, row in zip(best, probabilities, strict=True)
    ]


def answer_labels(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    from scipy.special import expit

    return [
        {
            "labels": [label_set.names[i] for i in np.flatnonzero(row > 0.5)],
            "probabilities": dict(zip(label_set.names, map(float, row), strict=True)),
        }
        for row in expit(logits.astype(np.float64))
    ]


def answer_values(outputs: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    return [{"value": float(value)} for value in outputs[:, 0]]


def answer_tags(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    """The tag of every word, and the entities they make up, as word numbers [first, past last]."""
    from seqeval.metrics.sequence_labeling import get_entities

    found = predicted_tags(logits, examples, label_set)
    marked = with_prefixes(found, label_set.names)
    return [
        {
            "tags": tags,
            "entities": [
                {
                    "label": label,
                    "words": [first, last + 1],
                    "text": " ".join(words[first : last + 1]),
                }
                for label, first, last in get_entities(prefixed)
            ],
        }
        for words, tags, prefixed in zip(examples.column("tokens"), found, marked, strict=True)
    ]


def predicted_tags(logits: Floats, examples: Examples, label_set: LabelSet) -> list[list[str]]:
    """One tag per word of every row; for words that were cut off or have no token `O`, or `?`."""
    assert examples.words is not None  # encode_words says where words begin
    outside = "O" if "O" in label_set.names else "?"
    found = [[outside] * len(words) for words in examples.column("tokens")]
    best = logits.argmax(axis=1)
    for item, row in enumerate(examples.rows):
        where = examples[item]
        words = examples.words[where]
        for token in np.flatnonzero(words >= 0):
            found[row][words[token]] = label_set.names[best[where.start + token]]
    return found


def answer_spans(logits: Floats, examples: Examples, label_set: LabelSet) -> list[dict[str, Any]]:
    """The best span of each question over all its windows, at most `MAX_ANSWER_TOKENS` long.

    Where questions may lack an answer, the empty one wins if its score (first token, the smallest
    over the windows) is higher (Devlin et al. 2019 on SQuAD 2.0).
    """
    assert examples.spans is not None  # encode_windows says which characters a token covers
    contexts = examples.column("context")
    best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(contexts)
    empty = [float("inf")] * len(contexts)
    for item, row in enumerate(examples.rows):
        where = examples[item]
        start, end = logits[where].astype(np.float64).T
        empty[row] = min(empty[row], float(start[0] + end[0]))
        inside = examples.spans[where, 0] >= 0
        if not inside.any():
            continue
        # Sums of a start and each of the next ends, as far as an answer reaches.
        ends = np.where(inside, end, -np.inf)
        ahead = np.pad(ends, (0, MAX_ANSWER_TOKENS - 1), constant_values=-np.inf)
        reach = np.lib.stride_tricks.sliding_window_view(ahead, MAX_ANSWER_TOKENS)
        sums = np.where(inside, start, -np.inf)[:, None] + reach
        first, length = divmod(int(sums.argmax()), MAX_ANSWER_TOKENS)
        if sums[first, length] > best[row][0]:
            spans = examples.spans[where]
            ends_at = spans[first + length, 1]
            best[row] = (float(sums[first, length]), spans[first, 0], ends_at)
    found = []
    for context, (score, begin, past), none in zip(contexts, best, empty, strict=True):
        if score == -np.inf or (label_set.negative == "" and none > score):
            found.append({"answer": "", "start": 0, "end": 0, "score": none})
        else:
            # Some tokenizers count the blank before a word to its first token.
            answer = context[begin:past].strip()
            start = context.index(answer, begin)
            place = {"start": start, "end": start + len(answer)}
            found.append({"answer": answer, **place, "score": score})
    return found
