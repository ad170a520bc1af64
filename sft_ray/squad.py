"""When two answers to a question are the same (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string

ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
CJK_PUNCTUATION = "。，、；：？！“”‘’（）《》〈〉「」『』·…—"
PUNCTUATION = str.maketrans("", "", string.punctuation + CJK_PUNCTUATION)


def normalize_answer(text: str) -> str:
    """SQuAD's rules: lower case, no punctuation, no articles, single blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())
