"""ahead: order, work done while the caller works, and errors of the source and of the work."""

import threading

import pytest

from fastbert.inference.ahead import AHEAD, ahead


def test_in_order_and_ahead():
    made = []
    for number, (item, square) in enumerate(ahead(range(20), lambda i: made.append(i) or i * i)):
        assert (item, square) == (number, number**2)
    assert made == list(range(20)) and list(ahead([], abs)) == []


def test_the_next_are_made_while_the_caller_works():
    done = [threading.Event() for _ in range(6)]
    for item, _ in ahead(range(6), lambda i: done[i].set()):
        for later in done[item : item + AHEAD + 1]:
            assert later.wait(5)


def test_an_error_of_the_source_comes_after_the_items_before_it():
    def source():
        yield from (1, 2, 3)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for item, _ in ahead(source(), abs):
            seen.append(item)
    assert seen == [1, 2, 3]


def test_an_error_of_the_work_comes_at_its_item():
    seen = []
    with pytest.raises(ZeroDivisionError):
        for item, _ in ahead((1, 0, 2), lambda i: 1 / i):
            seen.append(item)
    assert seen == [1]


def test_a_caller_that_stops_waits_for_no_more():
    made = []
    for item, _ in ahead(range(1000), made.append):
        if item == 3:
            break
    assert len(made) <= 3 + AHEAD + 2
