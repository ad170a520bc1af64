"""What a page is made of: words, tables and drawings in order, before they become HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Shade:
    """A table's cell behind which a colour stands for a share, 0 to 1."""

    words: str
    share: float
    is_bar: bool = False  # as long as the share, else as dark
    is_right: bool = False  # of the diagonal of a confusion matrix

    @property
    def fraction(self) -> str:
        return f"{min(max(self.share, 0.0), 1.0):.3f}"

    @property
    def is_dark(self) -> bool:
        return not self.is_bar and self.share > 0.55


Cell = str | Shade


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Attributes:
        words: numbers of the columns that hold words and stand to the left; figures stand right.
        long: those of them that need room.
        marked: numbers of the rows to stress.
        note: below the table.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: frozenset[int] = frozenset({0})
    long: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    caption: str = ""
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """An SVG with words above and below; a `wide` one scrolls in its box on a narrow screen."""

    kind: ClassVar[str] = "drawing"
    svg: Markup
    caption: str = ""
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` is plain, note or warning."""

    kind: ClassVar[str] = "text"
    words: str
    tone: str = "plain"


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: ClassVar[str] = "code"
    lines: str


@dataclass(frozen=True)
class Tile:
    """One figure to see at once."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """The figures to see first."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Legend:
    """Colours and what they mean: class of the mark -> words."""

    kind: ClassVar[str] = "legend"
    entries: dict[str, str]


@dataclass(frozen=True)
class Grid:
    """Blocks side by side where there is room."""

    kind: ClassVar[str] = "grid"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: Sequence[Block]


Block = Table | Drawing | Text | Code | Tiles | Legend | Grid | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]
