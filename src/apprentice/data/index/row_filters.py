"""Row filters: drop training rows by length, duplication, passages shared with test rows, label balance and number of rows.

    measure_rows   a chunk of rows → numbers a row: words, digest, MinHash signature, label, passage shared with a test row
    choose_rows    the numbers of a whole task → rows kept, and the number of rows that each filter dropped

Only these numbers are kept of a row (some 20 bytes; 280 for near duplicates), so that memory does not grow with the length of
rows. All functions are pure functions of rows and settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apprentice.data.index.ngrams import digest, ngrams, shingles, words_of
from apprentice.data.sampling.permutation import Keys, Numbers, draw, key_of, permute
from apprentice.errors import RowError
from apprentice.recipe import Filters
from apprentice.tasks.schema import Task

SIGNATURE = 64  # hash functions of MinHash; the standard error of the similarity is at most about 0.06
RUN_ROWS = 512  # neighbours that `max_rows` keeps or drops together, so that few row groups have to be read
MOST_COMPARED = 200  # rows of a bucket with which all others in it are compared; few buckets have more that are not duplicates
COMMON = 10  # a passage in more test rows of one task is boilerplate, such as a question that each of them asks


class RowMeasures(NamedTuple):
    """The numbers that filters need of some rows; arrays have one entry a row."""

    rows: Numbers  # row numbers in the source
    words: Numbers
    digests: Keys  # hashes of all words
    signatures: NDArray[np.uint32]  # (rows, SIGNATURE); (rows, 0) unless near duplicates are dropped
    labels: Numbers  # index of the answer among the choices; -1 for a row without one
    passages: Keys  # hash of the first passage shared with a test row; 0 for none


class PassageIndex(NamedTuple):
    """The passages (n-grams of words) of all test rows, ascending by hash; one entry for each passage and row."""

    hashes: Keys
    tasks: Numbers
    rows: Numbers


class FilterResult(NamedTuple):
    """The result of the filters for one task."""

    kept: Numbers
    dropped: dict[str, int]  # reason → rows
    contaminated: list[tuple[int, int]]  # (row, passage) of those that share one with a test row


def measure_rows(task: Task, rows: Sequence[Mapping[str, Any]], numbers: Numbers, filters: Filters, tests: Keys) -> RowMeasures:
    """Measures `rows`, whose row numbers are `numbers`; `tests` are the hashes of all test passages, ascending."""
    words = [words_of(row) for row in rows]
    signatures = np.zeros((len(rows), 0), np.uint32)
    if filters.duplicates == "near" and rows:
        from datasketch import MinHash

        hashed = MinHash.generator([shingles(row) for row in words], num_perm=SIGNATURE)
        signatures = np.array([one.hashvalues for one in hashed], np.uint64).astype(np.uint32)
    return RowMeasures(
        numbers,
        np.array([sum(map(len, row)) for row in words], np.int64),
        np.array([digest(row) for row in words], np.uint64),
        signatures,
        np.array([_label(task, row) for row in rows], np.int64) if filters.label_balance else np.full(len(rows), -1),
        _shared_passages(rows, filters.ngram, tests),
    )


def passages_of(rows: Sequence[Mapping[str, Any]], numbers: Numbers, length: int) -> tuple[Keys, Numbers]:
    """(hash, row number) of every passage of `length` words in the texts of test rows."""
    hashes, owners, _ = ngrams([words_of(row, only_texts=True) for row in rows], length)
    return hashes, numbers[owners]


def merge_passages(parts: Sequence[tuple[int, Keys, Numbers]]) -> PassageIndex:
    """Merges (number of the task, hashes, row numbers) of test rows; drops passages in more than `COMMON` rows of a task."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(part[1] for part in parts)])
    tasks = np.concatenate([np.zeros(0, np.int64), *(np.full(len(part[1]), part[0]) for part in parts)])
    rows = np.concatenate([np.zeros(0, np.int64), *(part[2] for part in parts)])
    order = np.lexsort((rows, tasks, hashes))
    hashes, tasks, rows = hashes[order], tasks[order], rows[order]
    if not len(hashes):
        return PassageIndex(hashes, tasks, rows)
    begins = np.append(True, (hashes[1:] != hashes[:-1]) | (tasks[1:] != tasks[:-1]))
    new_row = begins | np.append(True, rows[1:] != rows[:-1])
    group = np.cumsum(begins) - 1
    rare = np.bincount(group, weights=new_row)[group] <= COMMON
    return PassageIndex(hashes[rare & new_row], tasks[rare & new_row], rows[rare & new_row])


def choose_rows(name: str, measured: RowMeasures, filters: Filters, max_rows: int | None, seed: int) -> FilterResult:
    """Applies the filters in order to one task; a dropped row is counted under the first filter that drops it."""
    stays = np.ones(len(measured.rows), bool)
    dropped: dict[str, int] = {}

    def drop(reason: str, which: NDArray[np.bool_]) -> None:
        if count := int((which & stays).sum()):
            dropped[reason] = count
            stays[which] = False

    drop("too_few_words", measured.words < filters.min_words)
    if filters.max_words is not None:
        drop("too_many_words", measured.words > filters.max_words)
    shared = measured.passages != 0
    contaminated = list(zip(measured.rows[shared & stays].tolist(), measured.passages[shared & stays].tolist(), strict=True))
    drop("in_a_test_row", shared)
    if filters.duplicates != "keep":
        drop("duplicate", _duplicates(measured.digests, stays))
    if filters.duplicates == "near":
        drop("near_duplicate", _near_duplicates(measured.signatures, stays, filters.near_threshold))
    if filters.label_balance is not None:
        drop("label_balance", _surplus(measured, stays, filters.label_balance, key_of(seed, name, "label balance")))
    kept = limit_rows(measured.rows[stays], max_rows, key_of(seed, name, "max rows"))
    if len(kept) < stays.sum():
        dropped["max_rows"] = int(stays.sum()) - len(kept)
    return FilterResult(kept, dropped, contaminated)


def limit_rows(rows: Numbers, most: int | None, key: int) -> Numbers:
    """At most `most` of `rows`, ascending, in runs of `RUN_ROWS` neighbours chosen by `key`."""
    if most is None or len(rows) <= most:
        return rows
    runs = -(-len(rows) // RUN_ROWS)
    run_count = min(runs, -(-most // RUN_ROWS) + 1)  # one more, since the last run may be short
    chosen = permute(np.arange(run_count), runs, key)
    places = (chosen[:, None] * RUN_ROWS + np.arange(RUN_ROWS)).ravel()
    return np.sort(rows[places[places < len(rows)][:most]])


def _label(task: Task, row: Mapping[str, Any]) -> int:
    for template in task.scored_templates:
        try:
            example = task.render(row, template)
        except RowError:
            continue
        return example.choices.index(example.target) if example.target in example.choices else -1
    return -1


def _shared_passages(rows: Sequence[Mapping[str, Any]], length: int, tests: Keys) -> Keys:
    """For each row the hash of its first passage that a test row has too, or 0."""
    passages = np.zeros(len(rows), np.uint64)
    if not len(tests):
        return passages
    hashes, owners, starts = ngrams([words_of(row, only_texts=True) for row in rows], length)
    at = np.minimum(np.searchsorted(tests, hashes), len(tests) - 1)
    hit = np.flatnonzero(tests[at] == hashes)
    hit = hit[np.lexsort((starts[hit], owners[hit]))]
    first_owners, first = np.unique(owners[hit], return_index=True)
    passages[first_owners] = hashes[hit[first]]
    return passages


def _duplicates(digests: Keys, stays: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mask of the rows whose digest an earlier row that stays has too."""
    places = np.flatnonzero(stays)
    repeated = stays.copy()
    repeated[places[np.unique(digests[places], return_index=True)[1]]] = False
    return repeated


def _near_duplicates(signatures: NDArray[np.uint32], stays: NDArray[np.bool_], threshold: float) -> NDArray[np.bool_]:
    """Mask of near duplicates: rows whose MinHash signature agrees to `threshold` with that of an earlier row that stays.

    Only rows that share a bucket in some band of the signature are compared (locality-sensitive hashing).
    """
    # The tallest bands that still put 95 of 100 pairs at the threshold into one bucket: fewer pairs to compare.
    height = max(tall for tall in range(1, 17) if tall == 1 or 1 - (1 - threshold**tall) ** (SIGNATURE // tall) >= 0.95)
    gone = np.zeros(len(stays), bool)
    for band in range(SIGNATURE // height):
        places = np.flatnonzero(stays & ~gone)
        part = np.ascontiguousarray(signatures[places, band * height : (band + 1) * height])
        _, bucket = np.unique(part.view(np.dtype((np.void, part.itemsize * height))).ravel(), return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        ends = np.flatnonzero(np.append(bucket[order][1:] != bucket[order][:-1], True)) + 1
        for start, end in zip(np.append(0, ends[:-1]), ends, strict=True):
            members = places[order[start:end]]
            for _ in range(MOST_COMPARED):
                if len(members) < 2:
                    break
                first, members = members[0], members[1:]
                like = (signatures[members] == signatures[first]).mean(axis=1) >= threshold
                gone[members[like]] = True
                members = members[~like]
    return gone


def _surplus(measured: RowMeasures, stays: NDArray[np.bool_], ratio: float, key: int) -> NDArray[np.bool_]:
    """Mask of the rows of each label beyond `ratio` times the count of the rarest label, chosen by `key` and row number."""
    labels, counts = np.unique(measured.labels[stays & (measured.labels >= 0)], return_counts=True)
    surplus = np.zeros(len(stays), bool)
    for label in labels:
        places = np.flatnonzero(stays & (measured.labels == label))
        by_chance = places[np.argsort(draw(key, measured.rows[places]), kind="stable")]
        surplus[by_chance[int(ratio * counts.min()) :]] = True
    return surplus
