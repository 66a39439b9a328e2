"""Deterministic weighted interleaving: deals positions to tasks so evenly that every task's count is closed form.

    weights 3, 2, 1     leaf at positions 0, 1, 2, …     0 1 0 2 0 1 │ 0 1 0 2 0 1 │ …
                        count before position 6          3, 2 and 1

The weights are the leaves of a Huffman tree, and each position walks from the root to a leaf. Of the first n arrivals at a node,
round(n · left / total) go left, in exact integers:

    root (6) ──left──▶ leaf 0 (3)
       └──right──▶ node (3) ──left──▶ leaf 2 (1)
                       └──right──▶ leaf 1 (2)

Position 3 is the fourth arrival at the root. Of the first three, round(3 · 3/6) = 2 went left; of the first four, again 2: it goes
right. There it is the second arrival: of one, round(1/3) = 0 went left, of two, round(2/3) = 1: it goes left, to leaf 2.

A child errs by at most ½ plus its parent's error times its part of the
parent. Up a Huffman tree weights grow at least like the Fibonacci numbers, so the errors add up to less than
½ · (1 + 1 + 1/2 + 1/3 + 1/5 + …) < 1.7: the count of each weight is never as much as 2 away from its share, whatever the number
of weights or positions.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apprentice.data.sampling.permutation import Numbers

MAX_TOTAL = 2**31 - 1  # of all weights, so that every product below fits in 64 bits


class _Node(NamedTuple):
    total: int  # sum of the weights below this node
    left_total: int  # sum of those below its left child
    left: int  # number of a node, or ~leaf
    right: int


class WeightedInterleave:
    """Deals positions 0, 1, 2, … to leaves 0 … len(weights) - 1 in proportion to their weights.

    Raises `ValueError` unless the weights are positive integers that add up to at most `MAX_TOTAL`.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        if not weights or min(weights) < 1 or sum(weights) > MAX_TOTAL:
            raise ValueError(f"weights must be positive integers that add up to at most {MAX_TOTAL}")
        self.weights = tuple(weights)
        nodes, root = _huffman(weights)
        self._root = root
        self._total, self._left_total, self._left, self._right = np.array(nodes, dtype=np.int64).reshape(-1, 4).T.copy()
        # node, or ~leaf → (its parent, whether it is the left child)
        self._parent = {node.left: (number, True) for number, node in enumerate(nodes)}
        self._parent |= {node.right: (number, False) for number, node in enumerate(nodes)}

    def __reduce__(self) -> tuple[type[WeightedInterleave], tuple[tuple[int, ...]]]:
        return type(self), (self.weights,)

    def assign(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """(leaf, number of earlier positions with that leaf) for each position; int64 arrays of the shape of `positions`."""
        place = np.full(positions.shape, self._root, dtype=np.int64)
        arrivals = positions.astype(np.int64).copy()
        active = np.flatnonzero(place >= 0)
        while active.size:
            node, arrival = place[active], arrivals[active]
            total, left_total = self._total[node], self._left_total[node]
            cycles, within = arrival // total, arrival % total
            before = 2 * within * left_total + total
            left_before, left_after = before // (2 * total), (before + 2 * left_total) // (2 * total)
            goes_left = left_after > left_before
            left_count = cycles * left_total + left_before
            arrivals[active] = np.where(goes_left, left_count, arrival - left_count)
            place[active] = np.where(goes_left, self._left[node], self._right[node])
            active = active[place[active] >= 0]
        return ~place, arrivals

    def count(self, leaf: int, position: int) -> int:
        """Number of positions before `position` that go to `leaf`; O(depth of the tree)."""
        place, steps = ~leaf, []
        while place in self._parent:
            steps.append(self._parent[place])
            place = steps[-1][0]
        count = position
        for node, goes_left in reversed(steps):
            total = int(self._total[node])
            left_count = (2 * count * int(self._left_total[node]) + total) // (2 * total)
            count = left_count if goes_left else count - left_count
        return count


def _huffman(weights: Sequence[int]) -> tuple[list[_Node], int]:
    """The inner nodes of a Huffman tree and the number of its root; ties go to the earlier leaf, and to leaves before nodes."""
    heap = [(weight, leaf, ~leaf) for leaf, weight in enumerate(weights)]
    heapq.heapify(heap)
    nodes: list[_Node] = []
    while len(heap) > 1:
        left_total, _, left = heapq.heappop(heap)
        right_total, _, right = heapq.heappop(heap)
        nodes.append(_Node(left_total + right_total, left_total, left, right))
        heapq.heappush(heap, (left_total + right_total, len(weights) + len(nodes), len(nodes) - 1))
    return nodes, heap[0][2]
