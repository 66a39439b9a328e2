"""Writing of a checkpoint: each worker streams its shards to storage, the first one adds the index and makes the checkpoint count.

    every worker   tensors-0003-00.safetensors, its digests
    the first      index.json, state.json, checksums.json, then the commit to the run's fence

Nothing is collected in memory or in a temporary folder: on its way to the store is `WINDOW_BYTES` at most. Whatever ends in the
middle leaves a folder without `checksums.json`, which is no checkpoint, and the earlier checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from apprentice.errors import StorageError
from apprentice.run.fence import FenceToken
from apprentice.storage import Folder, with_retries
from apprentice.train.checkpoint.format import CHECKSUMS, INDEX, STATE, STEP, WEIGHTS, Checkpoint, prune_weights, remove
from apprentice.train.checkpoint.shard import Shard
from apprentice.train.checkpoint.shard_index import (
    DIGEST_BYTES,
    SAFETENSORS_NAMES,
    SavedTensor,
    ShardFile,
    ShardIndex,
    TensorPart,
    piece_bytes,
)
from apprentice.train.engine.collectives import Collectives
from apprentice.train.state import State

FILE_BYTES = 1 << 34  # of a tensors file, unless one shard is larger; S3 takes at most 10,000 parts of 10 MB and more
WINDOW_BYTES = 1 << 26  # most bytes that wait for the store at a time


def write_checkpoint(
    checkpoints: Folder,
    shards: Sequence[Shard],
    state: State,
    facts: dict[str, Any],
    token: FenceToken | None = None,
    *,
    collectives: Collectives | None = None,
    kind: str = STEP,
) -> Checkpoint | None:
    """Writes one checkpoint of all workers' `shards`; returns it on the first worker once it counts, None on the others.

    All workers of `collectives` (by default those of this process's group) must call it. Its folder is `<kind>-<n>.<token>`;
    without a token `<kind>-<n>`, or `<kind>-<n>.<k>` if that is taken. On the first worker, it raises `StorageError` if any worker
    could not write, such as on a full disk, and `FencedError` if another process has taken the run; then it does not count.
    """
    workers = collectives or Collectives()
    name, failure = "", None
    if workers.rank == 0:
        try:
            name = f"{kind}-{state.step:06d}.{token.writer}" if token else _free_name(checkpoints, kind, state.step)
        except (OSError, StorageError) as error:
            failure = error
    target = checkpoints / (name := workers.gather(name)[0])
    index = None
    if name:
        try:
            index = write_shards(target, workers.rank, shards)
        except (OSError, StorageError) as error:
            failure = error
    indices, failures = zip(*workers.gather((index, failure and _reason(failure))), strict=True)
    if workers.rank != 0:
        return None
    try:
        if reasons := [reason for reason in failures if reason]:
            raise StorageError(reasons[0])
        _write_description(target, ShardIndex.join(indices), {"state": state.to_json(), "facts": facts})
    except (OSError, StorageError) as error:
        if name:
            remove(target)
        raise _unwritten(state, checkpoints, error) from error
    if token is not None:
        try:
            # Asked anew after each look at the fence: a round's weights may be committed from another thread meanwhile.
            token.commit(name, lambda earlier: with_retries(checkpoints, (checkpoints / earlier).exists))
        except (OSError, StorageError) as error:
            raise _unwritten(state, checkpoints, error) from error
    return Checkpoint(target, state, facts)


def save_weights(
    checkpoints: Folder,
    shards: Sequence[Shard],
    state: State,
    token: FenceToken | None,
    collectives: Collectives,
    *,
    earliest: int,
) -> None:
    """Writes a snapshot of the weights alone, from all workers' `shards`, and deletes those before step `earliest`.

    All workers must call it; it returns once the snapshot counts. Raises what `write_checkpoint` does.
    """
    snapshot = write_checkpoint(checkpoints, shards, state, {}, token, collectives=collectives, kind=WEIGHTS)
    if snapshot is not None:
        prune_weights(checkpoints, snapshot, earliest)


def _unwritten(state: State, checkpoints: Folder, error: Exception) -> StorageError:
    return StorageError(f"the checkpoint of step {state.step} cannot be written to {checkpoints} ({_reason(error)})")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _free_name(checkpoints: Folder, kind: str, step: int) -> str:
    taken = {folder.name for folder in with_retries(checkpoints, checkpoints.children)}
    name, number = f"{kind}-{step:06d}", 1
    while name in taken:
        number += 1
        name = f"{kind}-{step:06d}.{number}"
    return name


def _write_description(target: Folder, index: ShardIndex, state: dict[str, Any]) -> None:
    """Writes index and state, and last their checksums, which make the folder a checkpoint."""
    sums = {}
    for name, content in ((INDEX, json.dumps(index.to_json(), separators=(",", ":"))), (STATE, json.dumps(state, indent=2))):
        data = content.encode()
        (target / name).write_bytes(data)
        sums[name] = hashlib.sha256(data).hexdigest()
    (target / CHECKSUMS).write_json(sums)


def write_shards(target: Folder, rank: int, shards: Sequence[Shard]) -> ShardIndex:
    """Writes the shards of worker `rank` into `target`, and the digests of their pieces; returns their index."""
    tensors, files = {shard.key: SavedTensor(shard.shape, shard.dtype, ()) for shard in shards}, []
    target.make()
    for number, batch in enumerate(_batches(shards)):
        name = f"tensors-{rank:04d}-{number:02d}.safetensors"
        size, parts, digests = _write_file(target / name, batch)
        file = ShardFile(name, size, hashlib.sha256(digests).hexdigest())
        (target / file.digests_file).write_bytes(digests)
        files.append(file)
        for shard, part in zip(batch, parts, strict=True):
            tensors[shard.key] = SavedTensor(shard.shape, shard.dtype, (part,))
    return ShardIndex(tensors, files)


def _batches(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """The shards that are not empty, in lists of `FILE_BYTES` at most."""
    batch: list[Shard] = []
    size = 0
    for shard in shards:
        if batch and shard.numel and size + shard.nbytes > FILE_BYTES:
            yield batch
            batch, size = [], 0
        if shard.numel:
            batch.append(shard)
            size += shard.nbytes
    if batch:
        yield batch


def _write_file(file: Folder, shards: Sequence[Shard]) -> tuple[int, list[TensorPart], bytes]:
    """Writes a safetensors file with each shard as a flat tensor; returns its size, the parts, and the digests of all pieces."""
    header = _header(shards)
    parts, digests = [], bytearray()
    fs, path = file.filesystem()
    with fs.open_output_stream(path) as stream:
        stream.write(header)
        offset = flushed = len(header)
        for shard in shards:
            piece = piece_bytes(shard.nbytes)
            parts.append(TensorPart(file.name, shard.start, shard.numel, offset, piece, len(digests) // DIGEST_BYTES))
            values, elements = shard.read().detach(), piece // shard.dtype.itemsize
            for first in range(0, shard.numel, elements):
                some = values[first : first + elements].to("cpu", shard.dtype).contiguous()
                data = some.view(torch.uint8).numpy().data
                digests += hashlib.sha256(data).digest()
                stream.write(data)
                offset += len(data)
                if offset - flushed >= WINDOW_BYTES:
                    stream.flush()  # waits for an object store, which else would be given copies faster than it takes them
                    flushed = offset
    return offset, parts, bytes(digests)


def _header(shards: Sequence[Shard]) -> bytes:
    """Header of a safetensors file: its length as 8 bytes, then JSON, padded to a multiple of 8 bytes."""
    entries, offset = {}, 0
    for shard in shards:
        end = offset + shard.nbytes
        entries[shard.key] = {"dtype": SAFETENSORS_NAMES[shard.dtype], "shape": [shard.numel], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
