"""Best-fit-decreasing bin packing."""

import bisect
from collections import defaultdict

import numpy as np
from jaxtyping import Int64


def pack_rows(lengths: Int64[np.ndarray, " rows"], capacity: int) -> list[list[int]]:
    """Puts rows into bins: the longest first, each into the fullest bin that still holds it.

    Takes O(n log n + n·c) for c distinct rooms, by keeping the bins sorted by room.

    Args:
        lengths: Tokens of each row.
        capacity: Tokens of a bin.

    Returns:
        The row indices of each bin, ascending; bins in the order of their first row.

    Raises:
        ValueError: If a row is longer than a bin.

    Source: Johnson 1973, "Near-optimal bin packing algorithms", the rule "best fit decreasing".
    """
    if len(lengths) and int(lengths.max()) > capacity:
        index = int(lengths.argmax())
        raise ValueError(f"row {index} has {lengths[index]} tokens, a bin holds {capacity}")
    bins: list[list[int]] = []
    rooms: list[int] = []  # rooms of the bins, ascending
    bins_by_room: defaultdict[int, list[int]] = defaultdict(list)
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chosen = len(bins)
            room = capacity
            bins.append([])
        else:
            room = rooms[place]
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del rooms[place]
        bins[chosen].append(row)
        left = room - length
        if left and not bins_by_room[left]:
            bisect.insort(rooms, left)
        if left:
            bins_by_room[left].append(chosen)
    return sorted((sorted(rows) for rows in bins), key=lambda rows: rows[0])
