"""Examples of texts that belong together, for embedders and rerankers, and readers of their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.training.finetune.examples import DataError, Reading, RowValues, Source, rows_of


@dataclass(frozen=True)
class VectorExample:
    """Texts whose vectors are compared, and what they are compared for.

    Attributes:
        texts: an anchor, its positive and hard negatives of it; or two texts with a score; or one text with a class.
        label: None; or a teacher's margins, one for each negative, or scores, one for each text but the anchor; or the
            score; or the name of the class.
    """

    where: str  # file:line
    texts: tuple[str, ...]
    label: tuple[float, ...] | float | str | None

    @property
    def kind(self) -> str:
        """The kind of data, by which losses are chosen: "pairs", "margins", "scores", "scored" or "classes"."""
        if isinstance(self.label, tuple):
            return "margins" if len(self.label) == len(self.texts) - 2 else "scores"
        return "pairs" if self.label is None else "scored" if isinstance(self.label, float) else "classes"


@dataclass(frozen=True)
class RankExample:
    """A query, documents, and how relevant each is: 0 for not at all; or a teacher's scores of them."""

    where: str
    query: str
    documents: tuple[str, ...]
    grades: tuple[float, ...]


def read_vectors(path: Source, reading: Reading) -> list[VectorExample]:
    """Pairs and triplets, scored pairs, or texts with classes, by the columns that a file has.

    All examples of a file have as many texts.
    """
    examples: list[VectorExample] = []
    for row in rows_of(path, reading, None):
        example = _vector_example(row, reading)
        if examples and (example.kind, len(example.texts)) != (examples[0].kind, len(examples[0].texts)):
            raise DataError(
                f"{row.where}: {_described(example)}; {examples[0].where} has {_described(examples[0])}, and all "
                "examples have the same"
            )
        examples.append(example)
    return examples


def _described(example: VectorExample) -> str:
    count, label = len(example.texts), example.label
    with_label = {"pairs": "no label", "scored": "a score", "classes": "a class"}
    told = with_label.get(example.kind) or f"{len(label) if isinstance(label, tuple) else 0} labels"
    return f"{count} text{'s' * (count > 1)} and {told}"


def _vector_example(row: RowValues, reading: Reading) -> VectorExample:
    if reading.anchor in row.values or reading.positive in row.values:
        anchor, positive, negatives = _triplet(row, reading)
        label = row.numbers(reading.label) if reading.label in row.values else None
        if label is not None and not negatives:
            raise DataError(
                f"{row.where}: there is a {reading.label} and no negative; a pair with a score has the columns "
                f"{reading.text}, pair and {reading.label}"
            )
        if label is not None and len(label) not in (len(negatives), len(negatives) + 1):
            raise DataError(
                f"{row.where}: {reading.label} has {len(label)} numbers; it must have {len(negatives)}, a teacher's "
                f"margins, or {len(negatives) + 1}, its scores"
            )
        return VectorExample(row.where, (anchor, positive, *negatives), label)
    pair = reading.pair or ("pair" if "pair" in row.values else None)
    if pair is not None:
        texts = row.text(reading.text), row.text(pair)
        return VectorExample(row.where, texts, row.number(reading.label))
    if reading.text not in row.values:
        raise DataError(
            f"{row.where}: there is no column {reading.anchor!r} and none {reading.text!r}, but "
            f"{', '.join(map(repr, row.values))}; a pair has {reading.anchor} and {reading.positive}, a scored pair "
            f"or a text with its class {reading.text}"
        )
    return VectorExample(row.where, (row.text(reading.text),), row.name(reading.label))


def _triplet(row: RowValues, reading: Reading) -> tuple[str, str, list[str]]:
    """An anchor, its positive and its negatives, of which there may be none."""
    anchor, positive = row.text(reading.anchor), row.text(reading.positive)
    numbered = f"{reading.negatives[0]}_"
    columns = [name for name in reading.negatives if name in row.values or len(reading.negatives) > 1]
    if len(reading.negatives) == 1:
        columns += sorted(
            (name for name in row.values if name.startswith(numbered) and name.removeprefix(numbered).isdecimal()),
            key=lambda name: int(name.removeprefix(numbered)),
        )
    negatives = []
    for column in columns:
        negatives += row.texts(column) if isinstance(row.value(column), list) else [row.text(column)]
    if negatives and anchor == positive:
        raise DataError(f"{row.where}: {reading.anchor} and {reading.positive} are equal, {anchor!r:.60}")
    if positive in negatives:
        raise DataError(f"{row.where}: {reading.positive} is one of its negatives, too, {positive!r:.60}")
    return anchor, positive, negatives


def read_ranked(path: Source, reading: Reading) -> list[RankExample]:
    """Queries with graded documents: a row for each document, or lists; or an anchor, its positive and its negatives.

    The rows of one query are one example, at the place of the first; a document that is there again counts once.
    """
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in rows_of(path, reading, None):
        if reading.anchor in row.values and reading.query not in row.values:
            query, positive, negatives = _triplet(row, reading)
            documents = [positive, *negatives]
            grades = row.numbers(reading.label) if reading.label in row.values else (1.0,) + (0.0,) * len(negatives)
        else:
            query, value = row.text(reading.query), row.value(reading.document)
            documents = row.texts(reading.document) if isinstance(value, list) else [row.text(reading.document)]
            grades = row.numbers(reading.label)
        if len(grades) != len(documents):
            raise DataError(f"{row.where}: {len(documents)} documents and {len(grades)} labels; each has one")
        _, of_query = found.setdefault(query, (row.where, {}))
        for document, grade in zip(documents, grades, strict=True):
            if of_query.setdefault(document, grade) != grade:
                raise DataError(
                    f"{row.where}: the label of {document!r:.60} is {grade:g}, and {of_query[document]:g} before; a "
                    "document of a query has one"
                )
    return [RankExample(where, query, tuple(of), tuple(of.values())) for query, (where, of) in found.items()]


def row_of_pair(example: VectorExample | RankExample, reading: Reading) -> dict[str, Any]:
    """A row that is read as this example."""
    if isinstance(example, RankExample):
        values: Sequence[Any] = (example.query, list(example.documents), list(example.grades))
        return dict(zip((reading.query, reading.document, reading.label), values, strict=True))
    first, *others = example.texts
    if example.kind == "classes":
        return {reading.text: first, reading.label: example.label}
    if example.kind == "scored":
        return {reading.text: first, reading.pair or "pair": others[0], reading.label: example.label}
    row: dict[str, Any] = {reading.anchor: first, reading.positive: others[0]}
    if len(reading.negatives) == 1:
        row[reading.negatives[0]] = others[1:]
    else:
        row |= dict(zip(reading.negatives, others[1:], strict=True))
    return row | {reading.label: list(example.label)} if isinstance(example.label, tuple) else row
