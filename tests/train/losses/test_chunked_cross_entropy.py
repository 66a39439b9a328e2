"""One call of the output layer for any number of targets; so processes with unequal numbers stay together under ZeRO-3."""

from __future__ import annotations

import gc
import os
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses import target_losses
from apprentice.train.losses.chunked_cross_entropy import TargetPlaces, chunked_cross_entropy
from apprentice.train.losses.sft import SupervisedLoss
from tests.models.architectures import made
from tests.train.losses import sharded_training
from tests.train.rows import packed_rows

VOCABULARY = 500
LIMIT_S = 120  # of one case: a process that waits for another one never ends
PLAIN: dict[str, Any] = {"objective": "sft", "method": "full", "checkpointing": False}
CASES: list[tuple[int, dict[str, Any]]] = [
    (2, PLAIN),
    (2, PLAIN | {"checkpointing": True}),
    (2, PLAIN | {"method": "lora", "ratio": 16.0}),
    (2, PLAIN | {"method": "lora", "checkpointing": True}),
    (2, PLAIN | {"method": "lora", "stage": 2, "dora": True, "ratio": 16.0}),
    (2, PLAIN | {"method": "lora", "dtype": "bfloat16"}),
    (2, PLAIN | {"objective": "weighted"}),
    (2, PLAIN | {"objective": "dpo"}),
    (2, PLAIN | {"objective": "orpo"}),
    (2, PLAIN | {"objective": "kto"}),
    (2, PLAIN | {"objective": "distill"}),
    (2, PLAIN | {"objective": "reward"}),
    (2, PLAIN | {"objective": "grpo", "method": "lora"}),
    (4, PLAIN),
    (4, PLAIN | {"method": "lora", "checkpointing": True}),
]
NAMES = ["-".join(map(str, (workers, *case.values()))) for workers, case in CASES]


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes chunks of this number of targets."""
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", 4 * VOCABULARY)
    return 4


def batch_of(targets: int, *, weighted: bool = False) -> SupervisedBatch:
    """A micro-batch with `targets` target tokens; `weighted`, each counts half."""
    batch = packed_rows(2).micro_batches(2)[0]
    is_target = torch.zeros_like(batch.is_target)
    for place in range(targets):
        is_target[place % 2, 1 + place // 2] = True
    return SupervisedBatch(batch.input_ids, batch.positions, is_target.float() * 0.5 if weighted else is_target)


def rows_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of targets of each computation of logits, as they happen."""
    head, rows = model.get_output_embeddings(), []
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda states: rows.append(len(states)) or plain(states))
    return rows


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("targets", [0, 1, 4, 5, 31])
def test_the_output_layer_is_called_once(targets: int, weighted: bool, in_chunks: int) -> None:
    model = made("llama")
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    loss = SupervisedLoss(model)
    for passes in (1, 2, 3):
        loss(batch_of(targets, weighted=weighted)).backward()
        assert len(calls) == passes


@pytest.mark.parametrize(("dtype", "weighted", "times"), [("float32", False, 1), ("float32", True, 2), ("float16", False, 2)])
def test_logits_are_computed_again_only_for_gradients_not_known_before(
    dtype: str, weighted: bool, times: int, in_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llama").to(getattr(torch, dtype))
    rows = rows_computed(model, monkeypatch)
    SupervisedLoss(model)(batch_of(10, weighted=weighted)).backward()
    assert rows == [4, 4, 2] * times


@pytest.mark.parametrize("targets", [3, 31])
def test_validation_computes_no_gradients(targets: int, in_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, outputs = made("llama"), []
    head = model.get_output_embeddings()
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda states: outputs.append(plain(states)) or outputs[-1])
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        SupervisedLoss(model)(batch_of(targets))
    assert outputs
    assert not any(logits.requires_grad for logits in outputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_automatic_casts_are_those_of_all_logits_at_once(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for numbers in (2**26, 4 * VOCABULARY):
        monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", numbers)
        model = made("llama")
        loss = SupervisedLoss(model, torch.bfloat16)(batch_of(31, weighted=weighted))
        loss.backward()
        results.append((loss.detach(), model.get_output_embeddings().weight.grad))
    (whole, of_whole), (chunked, of_chunked) = results
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    assert (of_chunked - of_whole).norm() <= 1e-2 * of_whole.norm()  # bfloat16 has 8 bits


def test_a_layer_with_modules_of_its_own_is_called_whole(in_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("qwen2")
    expected = SupervisedLoss(model)(batch_of(31))
    inner = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Sequential(inner))
    rows = rows_computed(model, monkeypatch)
    torch.testing.assert_close(SupervisedLoss(model)(batch_of(31)), expected, rtol=1e-6, atol=0)
    assert rows == [31]


@pytest.mark.parametrize("targets", [3, 31])
def test_nothing_is_kept_after_the_backward_pass(targets: int, in_chunks: int) -> None:
    model, hidden = made("llama"), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, arguments: hidden.append(weakref.ref(arguments[0])))
    loss = SupervisedLoss(model)
    gc.disable()
    try:
        loss(batch_of(targets)).backward()
        assert hidden[0]() is None
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the base of the reward model."""
    top = tmp_path_factory.mktemp("sharded")
    made("llama").save_pretrained(top / "reward")
    return top


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of all cases; each number of processes is started once, since that takes longer than a case."""
    os.environ["OMP_NUM_THREADS"] = "1"
    by_number: dict[int, dict[str, Any]] = {}
    for workers in (2, 4):
        numbers = [number for number, (size, _) in enumerate(CASES) if size == workers]
        for number, result in zip(numbers, trained(workers, folder, [CASES[number][1] for number in numbers]), strict=False):
            by_number[number] = result
    return [by_number.get(number, {}) for number in range(len(CASES))]


def trained(workers: int, folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of `cases` in order; those that a hang left out are missing. Ends the processes `LIMIT_S` after the last result."""
    place = folder / str(workers)
    place.mkdir()
    (place / "reward").symlink_to(folder / "reward")
    group = torch.multiprocessing.start_processes(
        sharded_training.process, (workers, str(place), cases), nprocs=workers, join=False, start_method="spawn"
    )
    saved, last, deadline = place / "results.pt", 0.0, time.monotonic() + LIMIT_S
    try:
        while not group.join(timeout=1.0) and time.monotonic() < deadline:
            if saved.exists() and (modified := saved.stat().st_mtime) > last:
                last, deadline = modified, time.monotonic() + LIMIT_S
    finally:
        for process in group.processes:
            if process.is_alive():
                process.kill()
    return torch.load(saved) if saved.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_split_training_is_training_in_one_process(results: list[dict[str, Any]], folder: Path, number: int) -> None:
    (workers, case), ours = CASES[number], results[number]
    assert ours, f"the processes hung: no result within {LIMIT_S} s"
    plain = sharded_training.plain(case, workers, folder)
    close = 1e-5 if case.get("dtype") is None else 2e-2
    for figure in ("loss", "norm", "validation"):
        assert ours[figure] == pytest.approx(plain[figure], rel=close)
    assert ours["weights"].keys() == plain["weights"].keys() != set()
    flat, plain_flat = (torch.cat([each["weights"][name].flatten() for name in plain["weights"]]) for each in (ours, plain))
    assert (flat - plain_flat).norm() <= close * plain_flat.norm()
    assert len(set(ours["calls"])) == 1


def test_many_chunks_in_bfloat16_lose_no_more_than_one() -> None:
    """The output layer's gradient is summed over chunks in float32."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 1024, 64, generator=generator).bfloat16()
    weight = (torch.randn(1000, 64, generator=generator) * 0.2).bfloat16()
    labels = torch.randint(1000, (1024,), generator=generator)
    exact = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(states[0].double() @ exact.T, labels, reduction="sum").backward()

    def error(size: int) -> float:
        head = torch.nn.Linear(64, 1000, bias=False, dtype=torch.bfloat16)
        head.weight.data.copy_(weight)
        places = TargetPlaces(torch.arange(1024), 1024)
        settings: dict[str, Any] = {"size": size, "finish": lambda logits: logits, "casting": nullcontext}
        loss, _, _ = chunked_cross_entropy(lambda: head(states), head, places, labels, "sum", **settings)
        loss.backward()
        assert exact.grad is not None
        assert head.weight.grad is not None
        return float((head.weight.grad.double() - exact.grad).norm() / exact.grad.norm())

    assert error(8) < 1.5 * error(1024), (error(8), error(1024))
