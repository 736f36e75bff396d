"""Converts the tags of words between schemes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_PREFIXED = re.compile(r"([A-Z])-(.+)")
_TO_BIO = {"S": "B", "U": "B", "E": "I", "L": "I", "M": "I", "B": "B", "I": "I"}
_SCHEMES = ("BIES", "BILU", "BMES")  # in addition to O


def to_bio(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """Converts the tags of a file's sentences to BIO; returns them unchanged if they follow no known scheme throughout.

    Known schemes are BIO, IOB1 (B- only between adjacent entities of a type), BIOES, BILOU, BMES, and plain types. With
    plain types, a run of a type is one entity if the file has O; otherwise, as for parts of speech, each word is one.
    """
    tags = {tag for sentence in sentences for tag in sentence}
    prefixed = {tag: found.groups() for tag in tags if (found := _PREFIXED.fullmatch(tag))}
    if not prefixed:
        return [_plain_to_bio(sentence, merge="O" in tags) for sentence in sentences]
    prefixes = {prefix for prefix, _ in prefixed.values()}
    if prefixed.keys() != tags - {"O"}:
        return [list(sentence) for sentence in sentences]
    if prefixes <= {"B", "I"}:
        if all(map(_is_iob1, sentences)) and not all(map(_is_bio, sentences)):
            return [_iob1_to_bio(sentence) for sentence in sentences]
    elif any(prefixes <= set(scheme) for scheme in _SCHEMES):
        return [[_TO_BIO[tag[0]] + tag[1:] if tag != "O" else tag for tag in sentence] for sentence in sentences]
    return [list(sentence) for sentence in sentences]


def _plain_to_bio(sentence: Sequence[str], *, merge: bool) -> list[str]:
    return [
        tag if tag == "O" else ("I-" if merge and tag == before else "B-") + tag
        for before, tag in pairwise(["O", *sentence])
    ]


def _is_bio(sentence: Sequence[str]) -> bool:
    return all(tag[0] != "I" or before[1:] == tag[1:] for before, tag in pairwise(["O", *sentence]))


def _is_iob1(sentence: Sequence[str]) -> bool:
    return all(tag[0] != "B" or before[1:] == tag[1:] for before, tag in pairwise(["O", *sentence]))


def _iob1_to_bio(sentence: Sequence[str]) -> list[str]:
    return [
        "B" + tag[1:] if tag[0] == "I" and before[1:] != tag[1:] else tag for before, tag in pairwise(["O", *sentence])
    ]
