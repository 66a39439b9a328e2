"""Each worker writes and reads its own part of a checkpoint: counted bytes, any number of workers, damage, sudden death."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from apprentice.errors import DamagedError, StorageError
from apprentice.run import fence
from apprentice.run.fence import FenceToken, Holder
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint import shard_index, shard_writer
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.shard import Shard, TensorRange
from apprentice.train.checkpoint.shard_index import ShardIndex
from apprentice.train.checkpoint.shard_reader import TensorReader, open_tensors
from apprentice.train.checkpoint.shard_writer import write_checkpoint
from apprentice.train.state import State
from tests.support.checkpoints import run_workers, save, whole_shards
from tests.support.counting_store import CountingStore
from tests.support.object_store import BUCKET, object_store

SHAPES = {"embed": (4_001, 75), "norm": (75,), "layers.0": (75, 300), "layers.1": (700, 301), "odd": (3,), "scale": ()}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "checkpoints")


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"{kind}/{name}": torch.randn(shape, generator=generator) for name, shape in SHAPES.items() for kind in KINDS}


def shards_of(tensors: dict[str, Tensor], rank: int, workers: int, stage: int) -> list[Shard]:
    """A worker's shards: at stage 3 an equal part of every tensor, at stage 2 a stretch of all tensors one behind the other."""
    shards, place = [], 0
    total = sum(tensor.numel() for tensor in tensors.values())
    for key, tensor in tensors.items():
        numel = tensor.numel()
        if stage == 3:
            part = math.ceil(numel / workers)
            first, last = min(rank * part, numel), min((rank + 1) * part, numel)
        else:
            first, last = (min(max(total * edge // workers - place, 0), numel) for edge in (rank, rank + 1))
        place += numel
        flat = tensor.flatten()
        read = lambda flat=flat, first=first, last=last: flat[first:last]  # noqa: E731
        shards.append(Shard(key, tuple(tensor.shape), first, last - first, read, tensor.dtype))
    return shards


def write_from(folder: Folder, tensors: dict[str, Tensor], workers: int, stage: int, step: int = 4) -> Checkpoint:
    """The checkpoint that so many workers write together."""
    results = run_workers(
        workers,
        lambda group: write_checkpoint(
            folder, shards_of(tensors, group.rank, workers, stage), State(step=step), {"dtype": "float32"}, collectives=group
        ),
    )
    assert isinstance(results[0], Checkpoint), results
    assert results[1:] == [None] * (workers - 1)
    return results[0]


def read_in(checkpoint: Checkpoint, like: dict[str, Tensor], workers: int, stage: int) -> dict[str, Tensor]:
    """The state as so many workers restore it, each its own ranges."""
    restored = {key: torch.full_like(tensor, float("nan")) for key, tensor in like.items()}

    def restore(group: Any) -> None:
        reader = TensorReader(checkpoint.folder)
        for shard in shards_of(like, group.rank, workers, stage):
            values = reader.read_range(TensorRange(shard.key, shard.start, shard.numel))
            restored[shard.key].view(-1)[shard.start : shard.start + shard.numel] = values
        reader.close()

    assert run_workers(workers, restore) == [None] * workers
    return restored


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_worker_writes_its_share_and_reads_what_it_needs(stage: int, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 → 2 → 3 workers, and stage 2 → 3 → 2; the bytes that count hold index and digests too."""
    tensors = state()
    for writers, readers in ((4, 2), (2, 3), (3, 4)):
        store = CountingStore()
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "filesystem", lambda self, store=store: store.filesystem(self))
            checkpoint = write_from(folder, tensors, writers, stage)
            restored = read_in(checkpoint, tensors, readers, stage)
            again = read_in(checkpoint, tensors, readers, 5 - stage)
        assert_same(restored, tensors)
        assert_same(again, tensors)
        for rank in range(writers):
            share = sum(shard.nbytes for shard in shards_of(tensors, rank, writers, stage))
            assert share <= store.bytes_written[f"worker-{rank}"] <= 1.1 * share
        for rank in range(readers):
            needed = sum(shard.nbytes for at in (2, 3) for shard in shards_of(tensors, rank, readers, at))
            assert needed <= store.bytes_read[f"worker-{rank}"] <= 1.2 * needed
        tensors = restored


def test_each_byte_is_hashed_once_when_written_and_once_when_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, hashed, real = state(), Counter[str](), hashlib.sha256
    size = sum(tensor.nbytes for tensor in tensors.values())
    phase = ["writing"]

    def counted(data: Any = b"", **more: Any) -> Any:
        hashed[phase[0]] += len(data)
        return real(data, **more)

    monkeypatch.setattr(hashlib, "sha256", counted)
    checkpoint = write_from(folder, tensors, 2, 3)
    phase[0] = "finding"
    assert checkpoints.find_newest(folder) == checkpoint
    phase[0] = "reading"
    assert_same(read_in(checkpoint, tensors, 2, 3), tensors)
    assert size <= hashed["writing"] <= 1.02 * size
    assert size <= hashed["reading"] <= 1.02 * size
    assert hashed["finding"] <= 0.02 * size


def test_nothing_is_staged_on_the_way_to_an_object_store_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state()
    with object_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        for name in ("mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"):
            monkeypatch.setattr(tempfile, name, None)
        folder = Folder.at(f"s3://{BUCKET}/run/checkpoints")
        made_by_two = write_from(folder, tensors, 2, 3)
        checkpoint = checkpoints.find_newest(folder)
        assert checkpoint == made_by_two
        assert_same(read_in(made_by_two, tensors, 3, 3), tensors)
        assert {key.rsplit("/", 1)[1] for key in store.objects} >= {"checksums.json", "tensors-0001-00.safetensors"}
        assert list(tmp_path.iterdir()) == []


def test_a_tensors_file_is_plain_safetensors(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "FILE_BYTES", 2_000_000)
    tensors = state()
    checkpoint = write_from(folder, tensors, 2, 3)
    files = sorted(checkpoint.folder.local.glob("tensors-0001-*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 2_001_000 for file in files)
    tensors_of_one = {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
    assert_same(tensors_of_one, {shard.key: shard.read() for shard in shards_of(tensors, 1, 2, 3) if shard.numel})
    assert_same(read_in(checkpoint, tensors, 1, 3), tensors)


def test_state_of_any_shape_and_number_format(folder: Folder) -> None:
    """Such as 8-bit moments with a scale for each block."""
    tensors = {
        "weight/a": torch.randn(70, 3),
        "codes/a": torch.randint(0, 255, (210,), dtype=torch.uint8),
        "scales/a": torch.randn(7),
        "half/a": torch.randn(9, 9).to(torch.bfloat16),
        "signed/a": torch.randint(-9, 9, (5,), dtype=torch.int8),
        "count/a": torch.tensor(7),
    }
    checkpoint = write_from(folder, tensors, 3, 2)
    with open_tensors(checkpoint) as reader:
        assert {key: reader.read(key).dtype for key in reader.shapes} == {key: tensor.dtype for key, tensor in tensors.items()}
        assert_same({key: reader.read(key) for key in reader.shapes}, tensors)


def test_pieces_are_of_64_mib_at_most_and_cut_no_element() -> None:
    assert shard_index.piece_bytes(1) == 2**12
    assert shard_index.piece_bytes(16 * 2**20 + 8) == 2**20 + 64
    assert shard_index.piece_bytes(2**40) == 2**26


@pytest.mark.parametrize("change", ["hole", "twice", "shape"])
def test_what_the_workers_hold_must_be_the_whole(change: str, folder: Folder) -> None:
    tensors = {"weight/a": torch.arange(12.0).view(3, 4)}

    def work(group: Any) -> Any:
        [shard] = shards_of(tensors, group.rank, 2, 3)
        if group.rank == 1:
            first, numel, shape = {"hole": (7, 5, (3, 4)), "twice": (5, 7, (3, 4)), "shape": (6, 6, (4, 3))}[change]
            shard = Shard(shard.key, shape, first, numel, lambda: torch.zeros(numel))
        return write_checkpoint(folder, [shard], State(step=1), {}, collectives=group)

    error, other = run_workers(2, work)
    assert isinstance(error, StorageError)
    assert "weight/a" in str(error)
    assert "defect" in str(error)
    assert other is None
    assert folder.children() == []


def test_one_worker_that_cannot_write_keeps_all_from_counting(folder: Folder) -> None:
    tensors = state()

    def work(group: Any) -> Any:
        shards = shards_of(tensors, group.rank, 2, 3)
        if group.rank == 1:

            def full() -> Tensor:
                raise OSError(28, "No space left on device")

            shards[0] = Shard(shards[0].key, shards[0].shape, shards[0].start, shards[0].numel, full)
        return write_checkpoint(folder, shards, State(step=3), {}, collectives=group)

    error, other = run_workers(2, work)
    assert str(error) == f"the checkpoint of step 3 cannot be written to {folder} (No space left on device)"
    assert other is None
    assert folder.children() == []


def test_damage_is_found_where_it_is_read_and_the_checkpoint_is_passed_over(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = state()
    earlier, newest = write_from(folder, tensors, 2, 3, step=2), write_from(folder, tensors, 2, 3, step=4)
    file = newest.folder.local / "tensors-0001-00.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checkpoints.find_newest(folder) == newest
    with open_tensors(newest) as reader:
        assert torch.equal(reader.read("weight/embed"), tensors["weight/embed"])  # whose pieces are what they were
        with pytest.raises(DamagedError, match=r"step-000004 is damaged \(tensors-0001-00.safetensors: bytes \d+ to \d+ changed"):
            reader.read("exp_avg_sq/odd")
    assert checkpoints.find_newest(folder) == earlier
    assert checkpoints.find_named(folder, "step-000004") is None
    assert "step-000004 is damaged" in caplog.text


@pytest.mark.parametrize("what", ["gone", "short", "digests", "no digests"])
def test_files_that_are_not_whole_are_seen_before_they_are_read(what: str, folder: Folder) -> None:
    tensors = state()
    earlier, newest = write_from(folder, tensors, 2, 3, step=2), write_from(folder, tensors, 2, 3, step=4)
    file = newest.folder.local / "tensors-0001-00.safetensors"
    digests = file.with_name(f"{file.name}.sha256")
    match what:
        case "gone":
            file.unlink()
        case "short":
            file.write_bytes(file.read_bytes()[:-1])
        case "digests":
            digests.write_bytes(bytes(len(digests.read_bytes())))
            with open_tensors(newest) as reader, pytest.raises(DamagedError, match=r"\.sha256: changed since it was written"):
                reader.read("weight/embed")
        case "no digests":
            digests.unlink()
    assert checkpoints.find_newest(folder) == earlier


@pytest.mark.parametrize("is_gone", [True, False], ids=["all", "some files"])
def test_a_checkpoint_that_is_deleted_before_it_is_opened_is_none_of_format_1(is_gone: bool, folder: Folder) -> None:
    checkpoint = write_from(folder, state(), 2, 3)
    for name in (checkpoints.CHECKSUMS, checkpoints.INDEX):
        (checkpoint.folder / name).delete()
    if is_gone:
        checkpoint.folder.delete()
    with pytest.raises(DamagedError, match=r"index\.json: is not there"), open_tensors(checkpoint):
        pass
    assert (checkpoint.folder / checkpoints.DAMAGED).exists() is False


def test_a_later_format_is_no_damage(folder: Folder) -> None:
    newest = save(folder, state().items(), State(step=1), {})
    file = newest.folder / checkpoints.INDEX
    file.write_json(file.read_json() | {"format": 3})
    sums = newest.folder / checkpoints.CHECKSUMS
    sums.write_json(sums.read_json() | {checkpoints.INDEX: hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(StorageError, match="is of format 3, and this version reads 2 at most"):
        checkpoints.find_newest(folder)


def write_format_1(folder: Folder, tensors: dict[str, Tensor], step: int) -> Folder:
    """A checkpoint as earlier versions wrote it: whole tensors, one digest a file."""
    target = (folder / f"step-{step:06d}").make()
    keys = list(tensors)
    for number, some in enumerate((keys[:5], keys[5:]), start=1):
        safetensors.torch.save_file({key: tensors[key] for key in some}, target.local / f"tensors-{number:04d}.safetensors")
    (target / checkpoints.STATE).write_json({"state": State(step=step).to_json(), "facts": {"dtype": "float32"}})
    files = [file for file in target.local.iterdir() if file.name != checkpoints.CHECKSUMS]
    (target / checkpoints.CHECKSUMS).write_json({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    return target


def test_checkpoints_of_format_1_are_read_by_ranges_too(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state()
    write_format_1(folder, tensors, 2)
    damaged = write_format_1(folder, tensors, 4)
    file = damaged.local / "tensors-0002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    earlier = checkpoints.find_newest(folder)
    assert earlier is not None
    assert earlier.state.step == 2
    store = CountingStore()
    monkeypatch.setattr(Folder, "filesystem", lambda self: store.filesystem(self))
    assert_same(read_in(earlier, tensors, 3, 3), tensors)
    for rank in range(3):
        needed = sum(shard.nbytes for shard in shards_of(tensors, rank, 3, 3))
        assert needed <= store.bytes_read[f"worker-{rank}"] <= 1.2 * needed


class KilledError(Exception):
    """The end of a process."""


def test_killed_at_any_moment_the_one_before_is_there(tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"weight/a": torch.randn(70_000), "exp_avg/a": torch.zeros(70_000)}
    holder = Holder("train", "node-b", 1, "another machine", "1", None, "2026-11-30 10:00:00 UTC")
    run = Folder.at(tmp_path)
    entry = fence._take(fence.FenceLog(run), holder, lambda _: None, lambda: 0.0, lambda _: None)
    token = FenceToken(run, entry.number)
    earlier = save(folder, tensors.items(), State(step=2), {}, token.start_group(1))
    left = [0]

    def notice() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    store = CountingStore(notice)
    write, commit = Folder.write_bytes, FenceToken.commit

    def noticed_write(self: Folder, data: bytes) -> None:
        notice()
        write(self, data)

    def noticed_commit(self: FenceToken, *arguments: Any) -> None:
        notice()
        commit(self, *arguments)

    moments, is_over = 0, False
    while not is_over:
        group = token.start_group(2 + moments)
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "filesystem", lambda self: store.filesystem(self))
            patch.setattr(Folder, "write_bytes", noticed_write)
            patch.setattr(FenceToken, "commit", noticed_commit)
            left[0] = moments
            try:
                write_checkpoint(folder, whole_shards(tensors.items()), State(step=4), {}, group)
                is_over = True
            except KilledError:
                moments += 1
        if not is_over:
            assert checkpoints.find_newest(folder) == earlier
            with open_tensors(earlier) as reader:
                assert_same({key: reader.read(key) for key in reader.shapes}, tensors)
            checkpoints.delete_leftovers(folder)
            assert [child.name for child in folder.children()] == [earlier.folder.name]
    assert moments >= 10  # the folder, a file with its header and pieces, digests, index, state, checksums, the commit
    newest = checkpoints.find_newest(folder)
    assert newest is not None
    assert newest.state.step == 4


def test_the_index_is_small_and_says_where_everything_lies(folder: Folder) -> None:
    tensors = state()
    checkpoint = write_from(folder, tensors, 4, 3)
    content = json.loads((checkpoint.folder / checkpoints.INDEX).read_bytes())
    index = ShardIndex.from_json(content)
    assert index.to_json() == content
    assert {key: entry.shape for key, entry in index.tensors.items()} == {key: tuple(value.shape) for key, value in tensors.items()}
    assert len((checkpoint.folder / checkpoints.INDEX).read_bytes()) < 10_000
