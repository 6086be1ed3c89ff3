"""Rows of a run in groups: which contestant is the fastest at the same work, by how much, and what got slower since
another run."""

import math
from typing import NamedTuple

GROUP = ("device", "dtype", "threads", "op", "shape", "pass")


class Group(NamedTuple):
    """One comparison. Ours and the rival are the fastest rows of either side that do the same work, None where there is none."""

    head: dict
    rows: list[dict]  # the fastest first, last those that could not be timed
    ours: dict | None
    rival: dict | None

    def of_fastest(self, row: dict) -> float | None:
        """How many times the fastest's time at the same work a contestant takes: one is the fastest."""
        fastest = min((side for side in (self.ours, self.rival) if side is not None), key=speed, default=None)
        return times_of(row, fastest)

    @property
    def gain(self) -> float | None:
        """How many times as fast as the rival we are; below one we lose."""
        return times_of(self.rival, self.ours)

    @property
    def gain_quartiles(self) -> tuple[float, float] | None:
        """Quartiles of the gain over the rounds; None where we are not timed beside the rival, and in results that lack
        them."""
        if self.gain is None or self.rival.get("of_ours_q1") is None:
            return None
        return self.rival["of_ours_q1"] / speed(self.ours), self.rival["of_ours_q3"] / speed(self.ours)


def speed(row: dict) -> float:
    """Rank a row within its group: by `of_ours` of the rounds, or in results that lack it by the median."""
    if row["median_ms"] is None:
        return math.inf
    return row["median_ms"] if row.get("of_ours") is None else row["of_ours"]


def times_of(row: dict | None, other: dict | None) -> float | None:
    """How many times as long as another of its group one takes."""
    known = row is not None and other is not None and row["median_ms"] is not None and other["median_ms"] is not None
    return speed(row) / speed(other) if known else None


def is_ours(row: dict) -> bool:
    return row["contestant"].startswith("mann_kernels")


def of_limit(row: dict) -> float | None:
    """The fraction of what the machine can do at most that a row reaches."""
    return row["least_ms"] / row["median_ms"] if row["least_ms"] is not None and row["median_ms"] else None


def grouped(timings: list[dict]) -> list[Group]:
    found: dict[tuple, list[dict]] = {}
    for row in timings:
        found.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    groups = []
    for head, rows in found.items():
        rows = sorted(rows, key=speed)
        same = [row for row in rows if row["same_work"] and row["median_ms"] is not None]
        ours = next((row for row in same if is_ours(row)), None)
        rival = next((row for row in same if not is_ours(row)), None)
        groups.append(Group(dict(zip(GROUP, head, strict=True)), rows, ours, rival))
    return groups


class Change(NamedTuple):
    row: dict
    old: dict
    ratio: float  # of the medians, new over old
    verdict: str  # slower, faster or within the spread


def changes(new: list[dict], old: list[dict]) -> list[Change]:
    """Every row that both runs timed. Slower or faster is what lies beyond the spread: quartiles that do not overlap."""

    def key(row):
        return tuple(row[name] for name in (*GROUP, "contestant"))

    before = {key(row): row for row in old if row["median_ms"] is not None}
    found = []
    for row in new:
        was = before.get(key(row))
        if was is None or row["median_ms"] is None:
            continue
        apart = "slower" if row["q1_ms"] > was["q3_ms"] else "faster" if row["q3_ms"] < was["q1_ms"] else None
        found.append(Change(row, was, row["median_ms"] / was["median_ms"], apart or "within the spread"))
    return found
