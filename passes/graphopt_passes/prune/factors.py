"""Which axes of a reshaped tensor become which."""

from __future__ import annotations


class Unknown(Exception):
    """An operator, or a form of it, of which nothing is known."""


def axis_runs(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes on both sides with equal products; empty where nothing is left on one."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine: list[int] = []
        theirs: list[int] = []
        left = right = 1
        while (not mine and not theirs) or left != right:
            if (left <= right and i < len(old)) or j >= len(new):
                if i >= len(old):
                    raise Unknown
                left *= old[i]
                mine.append(i)
                i += 1
            else:
                right *= new[j]
                theirs.append(j)
                j += 1
        while i < len(old) and old[i] == 1:
            mine.append(i)
            i += 1
        while j < len(new) and new[j] == 1:
            theirs.append(j)
            j += 1
        found.append((mine, theirs))
    return found
