"""CoNLL files and the schemes of their tags."""

import pytest

from fastbert.training.finetune.examples import DataError, Reading, read_words
from fastbert.training.finetune.tag_schemes import to_bio

CONLLU = """\
# sent_id = 1
# text = Anna can't
1\tAnna\tAnna\tPROPN\t_\t_\t2\tnsubj\t_\t_
2-3\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
2\tca\tcan\tAUX\t_\t_\t0\troot\t_\t_
2.1\tghost\t_\tVERB\t_\t_\t_\t_\t_\t_
3\tn't\tnot\tPART\t_\t_\t2\tadvmod\t_\tSpaceAfter=No

# newdoc
1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_
"""


@pytest.mark.parametrize(
    "given, bio",
    [
        ("B-X I-X O B-X B-X", "B-X I-X O B-X B-X"),
        ("I-X I-X B-X I-X O I-X I-Y", "B-X I-X B-X I-X O B-X B-Y"),  # IOB1
        ("B-X I-X E-X S-X O S-Y", "B-X I-X I-X B-X O B-Y"),
        ("B-X I-X L-X U-X O U-Y", "B-X I-X I-X B-X O B-Y"),
        ("B-X M-X E-X S-X O S-Y", "B-X I-X I-X B-X O B-Y"),
        ("X X O Y X", "B-X I-X O B-Y B-X"),
        ("NN NN -LRB- VB", "B-NN B-NN B--LRB- B-VB"),  # without O, words are tagged one by one
        ("O O", "O O"),
    ],
)
def test_schemes(given, bio):
    assert to_bio([given.split()]) == [bio.split()]


@pytest.mark.parametrize("tags", ["B-X O I-X", "B-X O Y", "O X-PER", "B-X E-X U-X", "B-X I-Y"])
def test_tags_that_follow_no_scheme_are_left_and_refused(tmp_path, tags):
    assert to_bio([tags.split()]) == [tags.split()]
    path = tmp_path / "a.conll"
    path.write_text("".join(f"w {tag}\n" for tag in tags.split()))
    with pytest.raises(DataError, match=r"a\.conll:1: "):
        read_words(path, Reading())


def test_one_sentence_that_is_not_iob1_decides_for_the_file():
    sentences = [["I-X", "O"], ["O", "B-X"]]
    assert to_bio(sentences) == sentences
    assert to_bio([["I-X", "O"], ["O", "I-X"]]) == [["B-X", "O"], ["O", "B-X"]]


def test_an_end_without_a_begin_is_refused(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("a O\nb E-X\nc S-X\n")
    with pytest.raises(DataError, match=r"a\.conll:1: I-X of 'b' follows O; an entity begins with B-X"):
        read_words(path, Reading())


def test_conllu_comments_ranges_and_empty_nodes(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU)
    examples = read_words(path, Reading())
    assert [(e.where, e.words, e.tags) for e in examples] == [
        (f"{path}:3", ["Anna", "ca", "n't"], ["B-PROPN", "B-AUX", "B-PART"]),
        (f"{path}:10", ["#"], ["B-SYM"]),
    ]
    assert read_words(path, Reading(words="3", tags="8"))[0].words == ["Anna", "can", "not"]
    assert read_words(path, Reading(words="3", tags="8"))[0].tags == ["B-nsubj", "B-root", "B-advmod"]
    with pytest.raises(DataError, match=r"a\.conllu:3: 10 columns; word and tag are columns 2 and 11"):
        read_words(path, Reading(tags="11"))


def test_a_word_that_is_a_number_sign_is_no_comment(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("# id = 1\n# O\n1 O\nrome B-LOC\n")
    (example,) = read_words(path, Reading())
    assert (example.where, example.words) == (f"{path}:2", ["#", "1", "rome"])
    path.write_text("1\tO\n2\tO\n")  # two columns: a word that is a number, and its tag
    assert read_words(path, Reading())[0].words == ["1", "2"]
