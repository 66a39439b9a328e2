"""Stateless keyed randomness: 64-bit keys from names, counter-based random numbers, and permutations of any size in O(1) memory.

Every function is pure and vectorised in `uint64`, whose products wrap around on purpose.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that multiplying by it permutes the 64-bit numbers
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Feistel rounds, and least bits of the permuted number. Measured: with fewer, small permutations are not equally likely.
_ROUNDS = 8
_LEAST_BITS = 6


def key_of(*parts: object) -> int:
    """A 64-bit key named by `parts`, such as `key_of(seed, task, "order")`; the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(numbers: Keys) -> Keys:
    """The finaliser of splitmix64, a bijection of 64-bit numbers in which every input bit reaches every output bit."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    finished: Keys = mixed ^ (mixed >> np.uint64(31))
    return finished


def draw(key: int | Keys, counters: Numbers | Keys) -> Keys:
    """Counter-based random numbers: for each of `counters` (one dimension or more) a uniform uint64 of (key, counter) alone."""
    keys = np.asarray(key, dtype=np.uint64)
    return mix(mix(np.asarray(counters).astype(np.uint64) * np.uint64(_GOLDEN) + keys) ^ keys)


def below(numbers: Keys, bounds: Numbers | int) -> Numbers:
    """Maps uniform 64-bit numbers to integers in [0, bound), uniform up to 2**-40 for the bounds that occur here; int64."""
    return (numbers % np.asarray(bounds).astype(np.uint64)).astype(np.int64)


def permute(indices: Numbers, sizes: Numbers | int, keys: Keys | int) -> Numbers:
    """The image of each index under the permutation of [0, size) that its key names; `sizes` and `keys` broadcast to `indices`.

    A Feistel network permutes the next power of two (at least 64). A number that falls outside [0, size) is permuted again until
    it is inside (cycle walking).
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
    """A Feistel network that permutes [0, 2**bits): each half of the number in turn is XORed with a hash of the other."""
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
    """The bit length of each number: 0 for 0, 3 for 4 to 7. Exact below 2**53."""
    return np.asarray(np.frexp(numbers.astype(np.float64))[1], dtype=np.uint64)
