"""`builtin:docstrings`: a real text-classification data set that every installation carries.

The first sentences of docstrings, parsed from the source files of packages that are installed
beside us; the label is the package.  Files are read with `ast`, nothing is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_ray.cache import build_once, cache_root
from sft_ray.errors import DataError

PACKAGES = ("numpy", "pandas", "python", "ray", "torch", "transformers")
EXAMPLES_PER_CLASS = 500
SPLIT_SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
WORDS_PER_SENTENCE = (4, 40)
SENTENCE_END = re.compile(r"(?<=[.!?])\s")
NOT_PROSE = re.compile(r"[^\x20-\x7e]|>>>|::|^[:@.\-=*#`]")


def docstrings() -> dict[str, pa.Table]:
    """Splits with the columns `text` and `label` (the package's name), the same on every call.

    Membership depends on the installed versions only; built in seconds, then cached.

    Raises:
        DataError: a package it reads is not installed as source files.
    """
    versions = [platform.python_version() if p == "python" else _version(p) for p in PACKAGES]
    recipe = repr((PACKAGES, versions, EXAMPLES_PER_CLASS, SPLIT_SHARES, WORDS_PER_SENTENCE, 2))
    key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    folder = build_once(cache_root() / "builtin" / f"docstrings-{key}", _build)
    return {split: pq.read_table(folder / f"{split}.parquet") for split in SPLIT_SHARES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"builtin:docstrings reads the package {package}, which is not installed; install it"
        ) from None


def _build(folder: Path) -> None:
    seen: set[str] = set()
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLIT_SHARES}
    for package in PACKAGES:
        sentences = _sentences(package, seen)
        sentences.sort(key=_stable_order)
        start = 0
        for split, share in SPLIT_SHARES.items():
            count = round(share * len(sentences))
            rows[split] += [(text, package) for text in sentences[start : start + count]]
            start += count
    for split, pairs in rows.items():
        pairs.sort(key=lambda pair: _stable_order(f"mixed {pair[0]}"))
        table = pa.table({"text": [t for t, _ in pairs], "label": [name for _, name in pairs]})
        pq.write_table(table, folder / f"{split}.parquet")


def _sentences(package: str, seen: set[str]) -> list[str]:
    """At most EXAMPLES_PER_CLASS sentences that no earlier package had; adds them to `seen`."""
    found: list[str] = []
    for path in _source_files(package):
        try:
            with warnings.catch_warnings(action="ignore"):  # other people's escape sequences
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for text in _first_sentences(tree):
            if text.casefold() not in seen:
                seen.add(text.casefold())
                found.append(text)
                if len(found) == EXAMPLES_PER_CLASS:
                    return found
    return found


def _source_files(package: str) -> list[Path]:
    """A package's files in an order that spreads over it and does not depend on the disk."""
    if package == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"builtin:docstrings found no source files of {package}; reinstall it")
        root = Path(spec.submodule_search_locations[0])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "thirdparty_files"}
    files = [f.relative_to(root) for f in root.rglob("*.py")]
    kept = [f for f in files if not skipped.intersection(f.parts)]
    return [root / f for f in sorted(kept, key=lambda f: _stable_order(f.as_posix()))]


def _first_sentences(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            paragraph = (ast.get_docstring(node) or "").split("\n\n", 1)[0]
            text = SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
            low, high = WORDS_PER_SENTENCE
            if low <= len(text.split()) <= high and not NOT_PROSE.search(text):
                yield text


def _stable_order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
