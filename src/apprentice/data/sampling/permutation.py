"""Keyed randomness without state: 64-bit keys from names, counter-based draws, and permutations of any size in O(1) memory.

Everything is a pure function of its arguments and vectorised in `uint64`, whose products wrap around on purpose.
Knows nothing of tasks, rows or files.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that multiplying by it permutes the 64-bit numbers
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Measured: with fewer rounds or bits, small permutations are not equally likely.
_ROUNDS = 8
_LEAST_BITS = 6


def key_of(*parts: object) -> int:
    """A 64-bit key named by `parts`, such as `key_of(seed, task, "order")`; the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(numbers: Keys) -> Keys:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    finished: Keys = mixed ^ (mixed >> np.uint64(31))
    return finished


def draw(key: int | Keys, counters: Numbers | Keys) -> Keys:
    """The generator keyed `key` at `counters` (one dimension or more): uniform 64-bit numbers, each computed by itself."""
    keys = np.asarray(key, dtype=np.uint64)
    return mix(mix(np.asarray(counters).astype(np.uint64) * np.uint64(_GOLDEN) + keys) ^ keys)


def below(numbers: Keys, bounds: Numbers | int) -> Numbers:
    """Uniform 64-bit numbers to uniform integers in [0, bound): all but 2**-40 even for the bounds that occur here."""
    return (numbers % np.asarray(bounds).astype(np.uint64)).astype(np.int64)


def permute(indices: Numbers, sizes: Numbers | int, keys: Keys | int) -> Numbers:
    """Where the permutation of [0, size) that `key` names sends `index`, for each element; the three broadcast to `indices`.

    A Feistel network permutes the next power of two (64 at least); what falls outside [0, size) walks on along its cycle until
    it is inside.
    """
    shape = indices.shape
    place = indices.astype(np.uint64).ravel()
    limit = np.broadcast_to(np.asarray(sizes).astype(np.uint64), shape).ravel()
    key = np.broadcast_to(np.asarray(keys, dtype=np.uint64), shape).ravel()
    bits = np.where(limit == 1, np.uint64(0), np.maximum(_bit_length(limit - np.uint64(1)), np.uint64(_LEAST_BITS)))
    round_keys = [mix(key + np.uint64(number * _GOLDEN % 2**64)) for number in range(1, _ROUNDS + 1)]
    place = _feistel(place, bits, round_keys)
    while (outside := np.flatnonzero(place >= limit)).size:
        place[outside] = _feistel(place[outside], bits[outside], [part[outside] for part in round_keys])
    return place.astype(np.int64).reshape(shape)


def _feistel(place: Keys, bits: Keys, round_keys: list[Keys]) -> Keys:
    """Permutes [0, 2**bits): the halves of the number are changed in turn, each by a hash of the other."""
    low_bits = (bits + np.uint64(1)) >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    low, high = place & low_mask, place >> low_bits
    for number, key in enumerate(round_keys):
        if number % 2:
            high = high ^ (_half_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_half_mix(high ^ key) & low_mask)
    permuted: Keys = (high << low_bits) | low
    return permuted


def _half_mix(numbers: Keys) -> Keys:
    """A cheap hash whose low 32 bits are good."""
    mixed = (numbers ^ (numbers >> np.uint64(32))) * _MIX_1
    hashed: Keys = (mixed ^ (mixed >> np.uint64(29))) >> np.uint64(24)
    return hashed


def _bit_length(numbers: Keys) -> Keys:
    """Bits that each number needs: 0 for 0, 3 for 4 to 7. Exact below 2**53."""
    return np.asarray(np.frexp(numbers.astype(np.float64))[1], dtype=np.uint64)
