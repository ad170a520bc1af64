"""Charts as SVG for a page: colours come from its style sheet, text stays text in any script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sft_ray.analysis.report.axes import Axis, NumberAxis

WIDTH, HEIGHT = 480, 300
TOP, RIGHT, BOTTOM = 12, 16, 46
LETTER = 7.2  # pixels of a tick's letter; wide ones of Chinese take two
SINGLE_UP_TO = 400  # marks with words of their own; more are one path
LABEL_LETTERS = 18
COLUMN, LINES_HEIGHT = 128, 300  # of parallel coordinates
ROW = 38  # of intervals

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A dot at values of both axes, and what it says when pointed at; `shift`: pixels sideways."""

    x: object
    y: float
    words: str
    shift: float = 0.0


@dataclass(frozen=True)
class Whisker:
    """A mean with its interval and the single values around it."""

    label: str
    mean: float | None
    low: float | None
    high: float | None
    values: Sequence[float]
    is_main: bool = False


@dataclass(frozen=True)
class Strand:
    """One trial across parallel axes; None where it lacks the parameter."""

    places: Sequence[float | None]
    style: str
    words: str


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; children and attributes are escaped unless they are Markup."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


@dataclass(frozen=True)
class Frame:
    """Two axes around a plot; marks are drawn in the plot's own pixels and cut off at its edge."""

    x: Axis
    y: NumberAxis
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def left(self) -> float:
        return 30 + LETTER * max((_letters(words) for _, words in self.y.ticks), default=1)

    @property
    def inner_width(self) -> float:
        return self.width - self.left - RIGHT

    @property
    def inner_height(self) -> float:
        return self.height - TOP - BOTTOM

    def at(self, x: object, y: float) -> Point:
        """Pixels of a pair of values."""
        across = self.x.place(x)  # type: ignore[arg-type]  # numbers on a number axis
        return across * self.inner_width, (1 - self.y.place(y)) * self.inner_height

    def draw(self, *marks: Markup, title: str, verticals: Sequence[float] = ()) -> Markup:
        """The whole chart; `verticals` are values of x with a dashed line."""
        lines = [
            tag("line", class_="rung", x1=x, x2=x, y1=0, y2=self.inner_height)
            for x, _ in (self.at(value, self.y.low) for value in verticals)
        ]
        plot = tag(
            "svg",
            *lines,
            *marks,
            x=self.left,
            y=TOP,
            width=self.inner_width,
            height=self.inner_height,
        )
        return _picture(self.width, self.height, title, *self._grid(), plot, *self._labels())

    def _grid(self) -> Iterable[Markup]:
        right, bottom = self.left + self.inner_width, TOP + self.inner_height
        for place, words in self.y.ticks:
            y = TOP + (1 - place) * self.inner_height
            yield tag("line", class_="grid", x1=self.left, x2=right, y1=y, y2=y)
            yield tag("text", words, class_="tick end", x=self.left - 8, y=y + 4)
        ticks = self.x.ticks
        room = self.inner_width / max(len(ticks), 1) / LETTER
        for place, words in ticks:
            x = self.left + place * self.inner_width
            yield tag("line", class_="tickmark", x1=x, x2=x, y1=bottom, y2=bottom + 4)
            yield tag("text", shortened(words, room), class_="tick middle", x=x, y=bottom + 18)
        yield tag("line", class_="axis", x1=self.left, x2=right, y1=bottom, y2=bottom)

    def _labels(self) -> Iterable[Markup]:
        middle = self.left + self.inner_width / 2
        yield tag("text", self.x.label, class_="label middle", x=middle, y=self.height - 8)
        turned = f"rotate(-90) translate({-(TOP + self.inner_height / 2):.1f} 13)"
        yield tag("text", self.y.label, class_="label middle", transform=turned)


def dots(frame: Frame, marks: Sequence[Mark], style: str, radius: float = 4) -> Markup:
    """One circle each, or a single path where there are very many."""
    places = [(*frame.at(mark.x, mark.y), mark) for mark in marks]
    if len(places) <= SINGLE_UP_TO:
        return Markup("").join(
            tag("circle", *_title(mark.words), class_=style, cx=x + mark.shift, cy=y, r=radius)
            for x, y, mark in places
        )
    path = "".join(f"M{x + mark.shift:.1f} {y:.1f}h0" for x, y, mark in places)
    return tag("path", class_=f"{style} many", d=path, stroke_width=round(1.4 * radius, 1))


def line(frame: Frame, points: Iterable[tuple[object, float]], style: str, words: str) -> Markup:
    """Through the points, in their order."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.at(*point) for point in points))
    return tag("polyline", *_title(words), class_=style, points=places)


def stairs(frame: Frame, points: Sequence[Point], until: float, style: str, words: str) -> Markup:
    """Level from each point to the next one, and from the last to `until`."""
    corners: list[Point] = []
    for i, (x, y) in enumerate(points):
        corners += [(x, y), (points[i + 1][0] if i + 1 < len(points) else until, y)]
    return line(frame, corners, style, words)


def parallel(axes: Sequence[Axis], strands: Sequence[Strand], title: str) -> Markup:
    """One upright axis per parameter; the foot below an axis is for trials without it."""
    height, foot = LINES_HEIGHT - 80, LINES_HEIGHT - 14
    width = COLUMN * len(axes) + 20

    def at(column: int, place: float | None) -> Point:
        return COLUMN * (column + 0.5), foot if place is None else 40 + (1 - place) * height

    lines = [
        tag(
            "polyline",
            *_title(strand.words),
            class_=strand.style,
            points=" ".join(
                f"{x:.0f},{y:.1f}" for x, y in (at(i, p) for i, p in enumerate(strand.places))
            ),
        )
        for strand in strands
    ]
    marks: list[Markup] = []
    for column, axis in enumerate(axes):
        x, _ = at(column, None)
        label = shortened(axis.label, LABEL_LETTERS)
        marks.append(tag("line", class_="axis", x1=x, x2=x, y1=40, y2=40 + height))
        marks.append(tag("text", label, tag("title", axis.label), class_="label middle", x=x, y=22))
        if any(strand.places[column] is None for strand in strands):
            marks.append(tag("text", "not set", class_="tick halo", x=x + 7, y=foot + 4))
        for place, words in axis.ticks:
            y = at(column, place)[1]
            marks.append(tag("line", class_="tickmark", x1=x - 4, x2=x, y1=y, y2=y))
            shown = shortened(words, 11)
            marks.append(tag("text", shown, class_="tick halo", x=x + 7, y=y + 4))
    return _picture(width, LINES_HEIGHT, title, *lines, *marks)


def whiskers(rows: Sequence[Whisker], axis: NumberAxis, title: str) -> Markup:
    """A row per mean, its label above it; the main row's interval goes through all as a band."""
    left, width = 8.0, WIDTH - 24.0
    bottom = ROW * len(rows) + 8
    parts: list[Markup] = []

    def x_of(value: float) -> float:
        return left + axis.place(value) * width

    for row in rows:
        if row.is_main and row.mean is not None:
            if row.low is not None and row.high is not None:
                low, high = x_of(row.low), x_of(row.high)
                parts.append(
                    tag("rect", class_="band", x=low, width=max(high - low, 0), y=0, height=bottom)
                )
            x = x_of(row.mean)
            parts.append(tag("line", class_="rung", x1=x, x2=x, y1=0, y2=bottom))
    for place, words in axis.ticks:
        x = left + place * width
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=0, y2=bottom))
        parts.append(tag("text", words, class_="tick middle", x=x, y=bottom + 16))
    for number, row in enumerate(rows):
        y = ROW * number + 30
        style = "base" if row.is_main else "complete"
        label = shortened(row.label, WIDTH / LETTER - 4)
        parts.append(tag("text", label, class_="tick halo strong", x=left, y=y - 13))
        if row.mean is None:
            parts.append(tag("text", "no run finished", class_="tick", x=left, y=y + 4))
            continue
        parts += [
            tag("circle", class_=f"{style} seed", cx=x_of(value), cy=y, r=3) for value in row.values
        ]
        if row.low is not None and row.high is not None:
            ends = {"x1": x_of(row.low), "x2": x_of(row.high)}
            parts.append(tag("line", class_=f"{style} whisker", y1=y, y2=y, **ends))
        told = f"{row.label}: {row.mean:.4f}"
        parts.append(tag("circle", tag("title", told), class_=style, cx=x_of(row.mean), cy=y, r=5))
    parts.append(tag("text", axis.label, class_="label middle", x=left + width / 2, y=bottom + 34))
    return _picture(WIDTH, bottom + 42, title, *parts)


def shortened(words: str, letters: float) -> str:
    """Cut so that it takes at most so many Latin letters' room."""
    if _letters(words) <= letters:
        return words
    kept = ""
    for letter in words:
        if _letters(kept + letter) > letters - 1:
            break
        kept += letter
    return f"{kept}…" if kept else ""


def _title(words: str) -> list[Markup]:
    """What a mark says when pointed at."""
    return [tag("title", words)] if words else []


def _letters(words: str) -> int:
    """Room in Latin letters; a Chinese one takes two."""
    return sum(2 if ord(letter) > 0x2E7F else 1 for letter in words)


def _picture(width: float, height: float, title: str, *parts: Markup) -> Markup:
    box = f"0 0 {width:.0f} {height:.0f}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=title)


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
