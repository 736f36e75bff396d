"""Where sentences end, by rule.

Pre-training asks little of a splitter: sentences are only the places at which segments may begin and end, and a
wrong one costs nothing but a segment that begins in mid-sentence. So these few rules, which know no language by
name and run at tens of megabytes a second, rather than a library. A line end always ends a sentence, so that text
with a sentence a line, as the BERT release has it, is split as it stands.
"""

from __future__ import annotations

import re

# Marks and closing quotes or brackets behind them: at the end of a sentence where white space follows; the full
# width ones of Chinese and Japanese need none.
_END = re.compile(r"""([.!?…]+)["'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*""")
_OPENING = """"'“‘«([¿¡-–—"""
# A full stop behind these, or behind single letters ("J.", "e.g.", "U.S."), ends no sentence.
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
