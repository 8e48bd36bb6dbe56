"""A device's memory is known to the byte."""

from __future__ import annotations

import numpy as np
import pytest

from .memory import ALIGNED, APART, FIRST, FRESH, GAP, GONE, DeviceMemory, SharedMemory

SIZE = 1 << 16


def test_every_byte():
    memory = DeviceMemory(1, SIZE)
    first, second = memory.allocate(10), memory.allocate(7, 4)
    assert first >= FIRST + APART
    assert first % ALIGNED == 0
    assert second % ALIGNED == 4
    assert (memory.view(first, 10) == FRESH).all()
    assert memory.outside(np.arange(first, first + 10), 1) is None
    assert memory.outside(np.arange(first - 1, first + 11), 1).tolist() == [0, 11]
    assert memory.outside(np.array([first + 6, first + 7, second + 3, second + 4]), 4).tolist() == [1, 3]
    assert memory.holds(second, 7)
    assert not memory.holds(second, 8)
    assert [memory.owns(place) for place in (first - 1, first, first + 9, first + 10)] == [
        False,
        True,
        True,
        False,
    ]
    assert memory.free(first)
    assert not memory.free(first)
    assert (memory.view(first, 10) == GONE).all()
    assert memory.outside(np.array([first]), 1).tolist() == [0]


def test_memory_is_used_again_when_it_is_short():
    memory = DeviceMemory(0, SIZE)
    kept = memory.allocate(SIZE // 4)
    seen = []
    for _ in range(50):
        place = memory.allocate(SIZE // 8)
        assert not kept - SIZE // 8 - GAP < place < kept + SIZE // 4 + GAP
        seen.append(place)
        memory.free(place)
    assert 3 < len(set(seen)) < 50
    with pytest.raises(MemoryError):
        memory.allocate(SIZE)


def test_words():
    """A device's own, and such of the host's as it may use, in one access."""
    memory = DeviceMemory(0, SIZE)
    host = np.arange(8, dtype=np.uint32)
    own = memory.allocate(32)
    memory.view(own, 32).view(np.uint32)[:] = np.arange(100, 108)
    memory.manage(host.ctypes.data, host.nbytes)
    places = np.array([own, host.ctypes.data + 8, own + 24])
    assert memory.outside(places, 8) is None
    assert [column.tolist() for column in memory.load(places, 4, 2)] == [[100, 2, 106], [101, 3, 107]]
    memory.store(places, 4, [np.array([1, 2, 3], np.uint32), np.uint32(9)])
    assert host.tolist() == [0, 1, 2, 9, 4, 5, 6, 7]
    assert memory.view(own, 32).view(np.uint32).tolist() == [1, 9, 102, 103, 104, 105, 3, 9]
    memory.manage(host.ctypes.data, 0)
    assert memory.outside(places, 8).tolist() == [1]


def test_shared_memory_that_nobody_wrote():
    memory = SharedMemory(64, 2)
    memory.store(np.array([0, 72]), 4, [np.array([5, 6], "u4")])
    assert memory.unwritten(np.array([0, 72]), 4) is None
    assert memory.unwritten(np.array([0, 72]), 8).tolist() == [0, 1]
    assert memory.load(np.array([0, 72]), 4, 1)[0].tolist() == [5, 6]
