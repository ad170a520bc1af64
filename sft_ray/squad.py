"""When two answers to a question are the same (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string

ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
CJK_PUNCTUATION = "。，、；：？！“”‘’（）《》〈〉「」『』·…—"
PUNCTUATION = str.maketrans("", "", string.punctuation)
ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + CJK_PUNCTUATION)
# Chinese characters, kana and hangul: scripts whose answers are compared character by character.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U0003ffff"
IS_CJK = re.compile(f"[{CJK}]")


def normalize_answer(text: str) -> str:
    """SQuAD's rules: lower case, no punctuation, no articles, single blanks.

    Texts with CJK characters lose the punctuation of these scripts, too.
    """
    removed = ALL_PUNCTUATION if IS_CJK.search(text) else PUNCTUATION
    return " ".join(ARTICLES.sub(" ", text.lower().translate(removed)).split())
