"""Prefetching: the same items, errors where they belong, and no thread left behind."""

import itertools
import threading
import time

import pytest

from lorax.data.prefetch import prefetch


def _threads():
    return [thread for thread in threading.enumerate() if thread.name == "lorax-prefetch"]


def _until(condition):
    while not condition():  # pytest's own limit is for what hangs
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_items_come_placed_and_in_order(depth):
    assert list(prefetch(iter(range(50)), lambda x: x * x, depth)) == [x * x for x in range(50)]
    assert not _threads()


def test_items_may_be_none_or_errors():
    items = [None, ValueError("an item, not raised"), ()]
    assert list(prefetch(iter(items), lambda x: x)) == items


def test_work_is_done_in_another_thread_and_ahead():
    made = []

    def place(item):
        made.append(threading.current_thread().name)
        return item

    stream = prefetch(itertools.count(), place, depth=3)
    assert next(stream) == 0
    _until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert made == ["lorax-prefetch"] * 4
    stream.close()


@pytest.mark.parametrize("fails", ["iterator", "place"])
def test_error_is_raised_in_its_turn(fails):
    def items():
        yield from range(3)
        if fails == "iterator":
            raise OSError("disk")
        yield 3

    def place(item):
        if item == 3:
            raise OSError("disk")
        return item

    stream, seen = prefetch(items(), place), []
    with pytest.raises(OSError, match="disk"):
        for item in stream:
            seen.append(item)
    assert seen == [0, 1, 2]
    assert not _threads()


def test_thread_ends_when_the_consumer_stops():
    stream = prefetch(itertools.count(), lambda x: x)
    next(stream)
    assert len(_threads()) == 1
    stream.close()
    assert not _threads()


def test_thread_ends_when_the_consumer_forgets_or_fails():
    with pytest.raises(RuntimeError, match="step"):
        for _ in prefetch(itertools.count(), lambda x: x):
            raise RuntimeError("step")
    _until(lambda: not _threads())


def test_no_thread_is_started_before_the_first_item():
    prefetch(itertools.count(), lambda x: x)
    assert not _threads()


def test_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        prefetch(iter(()), lambda x: x, 0)
