"""From checked fields to token sequences: one function per shape of input.

Each takes a table under its fields' names and returns `Encoded`, aligned with what a task needs to
find its way back from tokens to words or characters.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_ray.errors import DataError

IntArray = npt.NDArray[np.integer[Any]]
# Marks that a vocabulary is likely to have as a token of its own, best first.
MARKS = "@#$*%&+=^~|/;:!?,."
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Encoded:
    """Token sequences end to end, one per item; an item is a row, or one window of it.

    Attributes:
        tokens: token ids of all items, [total].
        offsets: start of each item in `tokens` and the end of the last, [n + 1].
        segments: token type ids, [total], where the input has two parts; else None.
        rows: the row each item was made from, [n].
        words: for the first token of a word the word's number in its row, else -1, [total].
        spans: first and past-the-last character of a token in its context, -1 elsewhere,
            [total, 2].
        num_truncated: rows that lost text.
    """

    tokens: IntArray
    offsets: IntArray
    segments: IntArray | None
    rows: IntArray
    words: IntArray | None = None
    spans: IntArray | None = None
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> slice:
        """Where an item's tokens lie."""
        return slice(int(self.offsets[item]), int(self.offsets[item + 1]))


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its limits, in tokens."""

    tokenizer: Any
    max_length: int
    doc_stride: int = 64


def encode_texts(table: pa.Table, encoder: Encoder) -> Encoded:
    """`text`, or `text` and `text_pair`, cut at the maximum length (the longer part first)."""
    parts = [table.column("text").to_pylist()]
    if "text_pair" in table.column_names:
        parts.append(table.column("text_pair").to_pylist())
    return _encode(encoder, parts)


def encode_marked(table: pa.Table, encoder: Encoder) -> Encoded:
    """`text` with `@ … @` around the subject and `# … #` around the object.

    The markers are made of existing vocabulary (Zhou and Chen, "An Improved Baseline for
    Sentence-level Relation Extraction", AACL 2022).  A text that is too long is cut around its
    entities rather than at its end.

    Raises:
        DataError: the vocabulary has no two marks.
    """
    subject, object_ = _marks(encoder.tokenizer)
    texts, entities = [], []
    for row in table.to_pylist():
        inserts = sorted(
            [
                (row["subject_start"], 1, f"{subject} "),
                (row["subject_end"], 0, f" {subject}"),
                (row["object_start"], 1, f"{object_} "),
                (row["object_end"], 0, f" {object_}"),
            ]
        )
        pieces, at, length, ends = [], 0, 0, []
        for place, _, mark in inserts:
            pieces += [row["text"][at:place], mark]
            length += place - at + len(mark)
            ends.append(length)
            at = place
        texts.append("".join([*pieces, row["text"][at:]]))
        entities.append((ends[0] - len(inserts[0][2]), ends[-1]))
    encoded = _encode(encoder, [texts])
    if encoded.num_truncated:
        for row in np.flatnonzero(np.diff(encoded.offsets) >= encoder.max_length):
            texts[row] = _around(encoder, texts[row], *entities[row])
        again = _encode(encoder, [texts])
        encoded = replace(again, num_truncated=encoded.num_truncated)
    return encoded


def encode_words(table: pa.Table, encoder: Encoder) -> Encoded:
    """`tokens` joined by blanks, with `@ … @` around the `predicate` where there is one.

    Raises:
        DataError: the vocabulary has no mark for the predicate.
    """
    rows = table.column("tokens").to_pylist()
    numbers: list[Sequence[int]] = [range(len(words)) for words in rows]
    if "predicate" in table.column_names:
        mark, _ = _marks(encoder.tokenizer)
        for i, predicate in enumerate(table.column("predicate").to_pylist()):
            at = predicate_position(rows[i], predicate)
            assert at is not None  # checked with the data
            before, after = range(at), range(at + 1, len(rows[i]))
            words = rows[i]
            rows[i] = [*words[:at], mark, words[at], mark, *words[at + 1 :]]
            numbers[i] = [*before, -1, at, -1, *after]
    encoded = _encode(encoder, [[" ".join(words) for words in rows]], with_spans=True)
    assert encoded.spans is not None  # asked for
    of_token = np.full(len(encoded.tokens), -1, dtype=np.int32)
    for item in range(len(encoded)):
        ends = np.cumsum([len(word) + 1 for word in rows[item]])
        where = encoded[item]
        starts, past = encoded.spans[where, 0], encoded.spans[where, 1]
        # Some tokenizers count the blank before a word to its first token: look at the end.
        place = np.searchsorted(ends, np.maximum(starts, past - 1), side="right")
        seen = -1
        for token in np.flatnonzero(past > starts):
            if place[token] > seen:
                seen = int(place[token])
                of_token[where.start + token] = numbers[item][seen]
    return replace(encoded, words=of_token, spans=None)


def encode_windows(table: pa.Table, encoder: Encoder) -> Encoded:
    """`question` and overlapping windows of `context`, as many as it takes.

    A question longer than half of the maximum is cut.  Windows share `doc_stride` tokens, or half
    of what the longest question leaves them if that is less.

    Raises:
        DataError: the maximum leaves no room for question and context.
    """
    tokenizer, room = encoder.tokenizer, encoder.max_length // 2
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if room <= special:
        raise DataError(
            f"data.max_length: question and context need at least {2 * special + 2} tokens with "
            f"this model, got {encoder.max_length}"
        )
    contexts = table.column("context").to_pylist()
    questions, num_truncated = [], 0
    for question in table.column("question").to_pylist():
        found = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
        too_long = len(found["input_ids"]) > room
        num_truncated += too_long
        cut = found["offset_mapping"][room - 1][1] if too_long else len(question)
        questions.append(question[:cut].strip())
    stride = min(encoder.doc_stride, max(0, (encoder.max_length - room - special) // 2))
    encoded = _encode(
        encoder,
        [questions, contexts],
        with_spans=True,
        truncation="only_second",
        stride=stride,
        return_overflowing_tokens=True,
    )
    return replace(encoded, num_truncated=num_truncated)


def predicate_position(words: Sequence[str], predicate: str | int) -> int | None:
    """Number of the predicate's word, given as a number or as the word; None if not clear."""
    if isinstance(predicate, int):
        return predicate if predicate < len(words) else None
    return words.index(predicate) if words.count(predicate) == 1 else None


def _encode(
    encoder: Encoder,
    parts: list[list[str]],
    *,
    with_spans: bool = False,
    truncation: str | bool = True,
    **options: Any,
) -> Encoded:
    """Tokenise one or two parts per row; spans are those of the last part."""
    tokens: list[IntArray] = []
    segments: list[IntArray] = []
    lengths: list[int] = []
    rows: list[int] = []
    spans: list[IntArray] = []
    truncated: set[int] = set()
    last = len(parts) - 1
    for start in range(0, len(parts[0]), ROWS_AT_ONCE):
        found = encoder.tokenizer(
            *(part[start : start + ROWS_AT_ONCE] for part in parts),
            truncation=truncation,
            max_length=encoder.max_length,
            return_attention_mask=False,
            return_token_type_ids=last == 1,
            return_offsets_mapping=with_spans,
            **options,
        )
        of_item = found.get("overflow_to_sample_mapping", range(len(found["input_ids"])))
        rows += [start + row for row in of_item]
        lengths += map(len, found["input_ids"])
        # As arrays at once: lists of numbers take ten times the memory.
        tokens.append(_flat(found["input_ids"], np.int32))
        if "token_type_ids" in found:
            segments.append(_flat(found["token_type_ids"], np.int8))
        truncated |= {
            start + row
            for row, encoding in zip(of_item, found.encodings, strict=True)
            if encoding.overflowing
        }
        if with_spans:
            for encoding in found.encodings:
                inside = np.array([part == last for part in encoding.sequence_ids])
                offsets = np.array(encoding.offsets, dtype=np.int32)
                spans.append(np.where(inside[:, None], offsets, np.int32(-1)))
    return Encoded(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        segments=np.concatenate(segments) if segments else None,
        rows=np.array(rows, dtype=np.int64),
        spans=np.concatenate(spans) if spans else None,
        num_truncated=len(truncated),
    )


def _flat(lists: Iterable[Sequence[int]], dtype: Any) -> IntArray:
    return np.fromiter((value for items in lists for value in items), dtype=dtype)


def _marks(tokenizer: Any) -> tuple[str, str]:
    """Two marks that are one known token each."""
    unknown = tokenizer.unk_token_id
    found = []
    for mark in MARKS:
        ids = tokenizer(f"a {mark} a", add_special_tokens=False)["input_ids"]
        alone = tokenizer(f" {mark}", add_special_tokens=False)["input_ids"]
        if unknown not in alone and len(alone) <= 2 and alone[-1] in ids:
            found.append(mark)
    if len(found) < 2:
        raise DataError("model: its vocabulary has no punctuation to mark entities with")
    return found[0], found[1]


def _around(encoder: Encoder, text: str, start: int, end: int) -> str:
    """The part of a marked text around its entities that fits; the whole text if all of it does.

    Args:
        start: first character of the first mark.
        end: first character behind the last mark.
    """
    found = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = found["offset_mapping"]
    room = encoder.max_length - encoder.tokenizer.num_special_tokens_to_add()
    if len(places) <= room:
        return text
    first = bisect.bisect_right([p[1] for p in places], start)
    last = bisect.bisect_left([p[0] for p in places], end)
    begin = max(0, min(first, last - room + (room - (last - first)) // 2))
    begin = min(begin, len(places) - room)
    stop = begin + room
    while True:
        part = text[places[begin][0] : places[stop - 1][1]]
        # A part that begins or ends inside a word can have more tokens than it had there.
        excess = len(encoder.tokenizer(part, add_special_tokens=False)["input_ids"]) - room
        if excess <= 0 or (begin >= first and stop <= last):
            return part
        if stop - last >= first - begin:
            stop = max(last, stop - excess)
        else:
            begin = min(first, begin + excess)
