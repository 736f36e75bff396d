"""A rule-based sentence splitter.

Pre-training needs no accurate splitter: sentence ends are only the places where segments may start and end, and a
wrong one merely makes a segment start in mid-sentence. Therefore a few language-independent rules are used instead of
a library; they run at tens of megabytes per second. A line end always ends a sentence, so text with one sentence per
line, as in the BERT release, is split at its lines.
"""

from __future__ import annotations

import re

# End marks with closing quotes or brackets. They end a sentence if white space follows; the full-width marks of
# Chinese and Japanese need no white space.
_END = re.compile(r"""([.!?…]+)["'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*""")
_OPENING = """"'“‘«([¿¡-–—"""
# A full stop after these, or after single letters ("J.", "e.g.", "U.S."), does not end a sentence.
_LETTERS = re.compile(r"(?:^|[^\w.)\]])(?:\w\.)+$")
_ABBREVIATIONS = """
    mr mrs ms dr prof st vs jr sr inc ltd co corp gen sen rep gov capt lt col sgt rev hon mt ft fig figs no nos vol
    pp ed eds approx ca cf al jan feb mar apr jun jul aug sep sept oct nov dec bzw nr mme mlle
"""
_ABBREVIATED = frozenset(_ABBREVIATIONS.split())


def split_sentences(text: str) -> list[str]:
    """The sentences of a document in order, without the white space around them; none is empty."""
    sentences = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            if _ends(line, end):
                sentences.append(line[start : end.end()])
                start = end.end()
        sentences.append(line[start:])
    return [stripped for sentence in sentences if (stripped := sentence.strip())]


def _ends(line: str, end: re.Match) -> bool:
    following = line[end.end() : end.end() + 4].lstrip(_OPENING)[:1]
    if not following or end[1] is None:
        return True
    if following.islower():
        return False
    if end[1] != ".":
        return True
    before = line[max(0, end.start() - 24) : end.start()]
    words = before.split()
    word = words[-1].lstrip(_OPENING) if words else ""
    return word.lower() not in _ABBREVIATED and not _LETTERS.search(before + ".")
