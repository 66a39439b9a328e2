"""Requests join and leave a running batch, and their replies are those they would have alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from apprentice.errors import ModelError
from apprentice.inference.decoding import generate, make_scheduler
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, NotFiniteError, Sampling
from apprentice.inference.kv_cache import KvCache
from apprentice.inference.runners import causal
from apprentice.inference.runners.causal import probe_model
from apprentice.inference.scheduler import Scheduler
from apprentice.models.loading import load_model
from tests.models.architectures import made

PROMPTS = [[(11 * length + 7 * place) % 509 + 3 for place in range(length)] for length in (1, 5, 40, 13, 2, 27, 8, 60, 3, 19)]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model, torch.float32)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The plain way: the whole text through the model for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def drain(scheduler: Scheduler) -> list[list[GeneratedToken]]:
    steps = []
    while scheduler.running or scheduler.waiting:
        steps.append(scheduler.step())
    return steps


def test_generate_equals_the_plain_way(model: Any) -> None:
    replies = generate(model, PROMPTS, max_new_tokens=12, stop_ids=(), max_running=4)
    assert replies == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, [], max_new_tokens=12, stop_ids=()) == []


def test_generate_ends_before_the_stop_id(model: Any) -> None:
    whole = greedy(model, PROMPTS[1], 12)
    stop = whole[5]
    assert generate(model, [PROMPTS[1]], max_new_tokens=12, stop_ids=[stop]) == [whole[: whole.index(stop)]]


def test_requests_join_between_steps_and_leave_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[int]] = []

    def counting(*args: Any) -> torch.Tensor:
        rows.append([len(segment.ids) for segment in args[2]])
        return compute_logits(*args)

    scheduler = make_scheduler(model, slots=2, context=64)
    compute_logits = causal.compute_logits
    monkeypatch.setattr(causal, "compute_logits", counting)
    scheduler.submit("a", GenerationRequest(PROMPTS[1], 4))
    steps = [[token[:3:2] for token in scheduler.step()]]
    scheduler.submit("b", GenerationRequest(PROMPTS[4], 1))
    scheduler.submit("c", GenerationRequest(PROMPTS[8], 2))
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    while scheduler.running or scheduler.waiting:
        steps.append([token[:3:2] for token in scheduler.step()])
    assert steps == [[("a", None)], [("a", None), ("b", "length")], [("a", None), ("c", None)], [("a", "length"), ("c", "length")]]
    # Every step is one pass over the weights; c takes b's place in the very next one.
    assert rows == [[5], [1, 2], [1, 3], [1, 1]]


def test_a_long_prompt_is_read_in_chunks_beside_running_requests(model: Any) -> None:
    scheduler = make_scheduler(model, slots=3, context=100, prefill_tokens=25)
    scheduler.submit("short", GenerationRequest(PROMPTS[1], 9))
    scheduler.submit("long", GenerationRequest(PROMPTS[7], 6))
    scheduler.submit("next", GenerationRequest(PROMPTS[2], 3))
    steps = drain(scheduler)
    keys = [[token.key for token in step] for step in steps]
    # Prompts of 5, 60 and 40 tokens, in pieces of 25 and no more than 25 a step: 5; 25; 25; 10 + 15 of next do not fit: 10; 25; 15.
    assert keys[:6] == [
        ["short"],
        ["short"],
        ["short"],
        ["short", "long"],
        ["short", "long"],
        ["short", "long", "next"],
    ]
    replies = {key: [token.id for step in steps for token in step if token.key == key] for key in ("short", "long", "next")}
    assert replies == {
        "short": greedy(model, PROMPTS[1], 9),
        "long": greedy(model, PROMPTS[7], 6),
        "next": greedy(model, PROMPTS[2], 3),
    }


def test_cancelled_requests_give_their_slot_back(model: Any) -> None:
    scheduler = make_scheduler(model, slots=1, context=64)
    for key in "abc":
        scheduler.submit(key, GenerationRequest(PROMPTS[1], 3))
    scheduler.step()
    scheduler.cancel("a")
    scheduler.cancel("b")
    scheduler.cancel("unknown")
    assert (scheduler.running, scheduler.waiting) == (0, 1)
    steps = drain(scheduler)
    assert [token.key for step in steps for token in step] == ["c"] * 3
    assert [token.id for step in steps for token in step] == greedy(model, PROMPTS[1], 3)
    assert scheduler.step() == []


def test_a_full_context_ends_the_reply(model: Any) -> None:
    scheduler = make_scheduler(model, slots=1, context=8)
    scheduler.submit("a", GenerationRequest([5, 6, 7, 8, 9], 100))
    tokens = [token for step in drain(scheduler) for token in step]
    # Five tokens of the prompt, three of the reply fill the context; a fourth needs no place in it.
    assert [token.finish for token in tokens] == [None, None, None, "length"]
    with pytest.raises(ModelError, match="8 tokens; the context of 8 leaves no room"):
        scheduler.submit("b", GenerationRequest(list(range(3, 11)), 1))
    with pytest.raises(ModelError, match="the prompt is empty"):
        scheduler.submit("c", GenerationRequest([], 1))


def test_sampled_replies_do_not_depend_on_company(model: Any) -> None:
    def replies(numbers: list[int], slots: int) -> dict[int, list[int]]:
        scheduler = make_scheduler(model, slots=slots, context=128)
        for number in numbers:
            scheduler.submit(number, GenerationRequest(PROMPTS[number], 20, sampling=Sampling(1.0, 0.9, seed=100 + number)))
        tokens = [token for step in drain(scheduler) for token in step]
        return {number: [token.id for token in tokens if token.key == number] for number in numbers}

    everybody = list(range(len(PROMPTS)))
    together = replies(everybody, slots=10)
    alone = {number: replies([number], slots=1)[number] for number in everybody}
    assert together == alone
    assert len({tuple(reply) for reply in together.values()}) == len(PROMPTS)


def test_bfloat16_leaves_the_single_reply_only_where_two_tokens_are_close(tiny_model: Path) -> None:
    model = load_model(tiny_model, torch.bfloat16)
    together = generate(model, PROMPTS, max_new_tokens=40, stop_ids=(), max_running=len(PROMPTS))
    left = 0
    for prompt, reply in zip(PROMPTS, together, strict=True):
        alone = generate(model, [prompt], max_new_tokens=40, stop_ids=())[0]
        if alone != reply:
            left += 1
            common = next(place for place, (one, other) in enumerate(zip(alone, reply, strict=True)) if one != other)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + alone[:common]]), use_cache=False).logits[0, -1].float()
            best = logits.topk(2).values
            assert float(best[0] - best[1]) < 0.25
    assert left < len(PROMPTS)


def plain_scores(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), dim=-1)  # type: ignore[no-any-return]


def test_scores_of_prompt_and_reply_are_the_models(model: Any) -> None:
    scheduler = make_scheduler(model, slots=2, context=100, prefill_tokens=25)
    scheduler.submit("other", GenerationRequest(PROMPTS[2], 8))
    scheduler.submit("a", GenerationRequest(PROMPTS[7], 3, logprobs=2, score_from=0))
    tokens = [token for step in drain(scheduler) for token in step if token.key == "a"]
    ids = PROMPTS[7] + [token.id for token in tokens]
    expected = plain_scores(model, ids)
    scored = [*tokens[0].prompt_scores, *(token.score for token in tokens)]
    assert scored[0] == (ids[0], None, ())
    assert [one.id for one in scored if one] == ids
    for place, one in enumerate(scored[1:], start=1):
        assert one is not None
        assert one.logprob == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        best = expected[place - 1].topk(2)
        assert [id for id, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [token.prompt_scores for token in tokens[1:]] == [(), ()]
    scheduler.submit("b", GenerationRequest(PROMPTS[7], 1, logprobs=0, score_from=50))
    (tail,) = [token for step in drain(scheduler) for token in step]
    assert [one.id for one in tail.prompt_scores] == PROMPTS[7][50:]
    assert [one.logprob for one in tail.prompt_scores] == pytest.approx(
        [one.logprob for one in tokens[0].prompt_scores[50:]], abs=1e-4
    )
    assert scheduler.reused_tokens == 49  # from the first request's memory


def test_a_shared_beginning_is_computed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counting(*args: Any) -> torch.Tensor:
        computed.append(sum(len(segment.ids) for segment in args[2]))
        return compute_logits(*args)

    scheduler = make_scheduler(model, slots=3, context=100)
    compute_logits = causal.compute_logits
    monkeypatch.setattr(causal, "compute_logits", counting)
    head = PROMPTS[7]
    prompts = [[*head, 7, 8], [*head, 9], [*head, 7, 8]]
    for number, prompt in enumerate(prompts):
        scheduler.submit(number, GenerationRequest(prompt, 5))
    steps = drain(scheduler)
    # The first is read whole while the others wait; then one token of the second, and one of the third, is left to read.
    assert computed[:2] == [62, 1 + 1 + 1]
    assert scheduler.reused_tokens == 60 + 61
    replies = [[token.id for step in steps for token in step if token.key == number] for number in range(3)]
    assert replies == [greedy(model, prompt, 5) for prompt in prompts]


def test_bias_penalties_and_constraints(model: Any) -> None:
    def reply(sampling: Sampling, constraint: Any = None) -> list[int]:
        scheduler = make_scheduler(model, slots=1, context=64)
        scheduler.submit("a", GenerationRequest(PROMPTS[1], 12, sampling=sampling, constraint=constraint))
        return [token.id for step in drain(scheduler) for token in step]

    class Countdown:
        said: ClassVar[list[int]] = []

        def allowed(self) -> np.ndarray:
            return np.arange(512) == 20 - len(self.said)

        def accept(self, id: int) -> None:
            self.said.append(id)

    assert reply(Sampling(bias={77: 1000.0})) == [77] * 12
    assert len(set(reply(Sampling(presence_penalty=1000.0)))) == 12
    both = reply(Sampling(bias={77: 1000.0, 78: 1000.0}, frequency_penalty=100.0))
    assert [sorted(both[place : place + 2]) for place in range(0, 12, 2)] == [[77, 78]] * 6
    assert reply(Sampling(temperature=1.0, seed=3), Countdown()) == list(range(20, 8, -1))


def test_requests_wait_for_memory_and_say_the_same(model: Any) -> None:
    of_one = probe_model(model).position_bytes
    scheduler = make_scheduler(model, slots=8, context=90, kv_bytes=150 * of_one + 1)
    assert (scheduler.kv_tokens, scheduler.context) == (150, 90)
    for number, prompt in enumerate(PROMPTS):
        scheduler.submit(number, GenerationRequest(prompt, 12))
    replies: dict[Any, list[int]] = {number: [] for number in range(len(PROMPTS))}
    most_running, most_reserved = 0, 0
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            replies[token.key].append(token.id)
        most_running, most_reserved = max(most_running, scheduler.running), max(most_reserved, scheduler.reserved_tokens)
        assert scheduler.used_tokens <= scheduler.reserved_tokens <= 150
    assert list(replies.values()) == [greedy(model, prompt, 12) for prompt in PROMPTS]
    # 1, 5, 40, 13 and 2 tokens with 12 new ones each come to 121; the prompt of 27 and all behind it wait.
    assert (most_running, scheduler.reserved_tokens) == (5, 0)
    assert make_scheduler(model, slots=8, context=90, kv_bytes=50 * of_one).context == 50
    with pytest.raises(ModelError, match="room for 1 tokens"):
        make_scheduler(model, slots=8, context=90, kv_bytes=of_one)


def test_two_system_prompts_that_take_turns_are_read_once_each(model: Any) -> None:
    scheduler = make_scheduler(model, slots=4, context=128)
    systems = [[(place * step + 3) % 509 + 3 for place in range(50)] for step in (7, 11)]
    for number in range(6):
        prompt = [*systems[number % 2], 5 + number, 9]
        scheduler.submit(number, GenerationRequest(prompt, 4))
        assert [token.id for step in drain(scheduler) for token in step] == greedy(model, prompt, 4)
    assert scheduler.reused_tokens == 4 * 50


def test_logits_that_are_not_finite_write_nothing() -> None:
    model = made("mistral")
    with torch.no_grad():
        model.get_input_embeddings().weight[499] = float("nan")
    with pytest.raises(NotFiniteError, match=r"^the model's logits are not finite") as caught:
        generate(model, [[5, 6, 7], [5, 499, 6], [8, 9]], max_new_tokens=3, stop_ids=())
    assert caught.value.number == 1
    assert pickle.loads(pickle.dumps(caught.value)).number == 1  # errors cross processes
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"^MistralForCausalLM: the model's logits are not finite"):
        generate(model, [[5, 6, 7]], max_new_tokens=3, stop_ids=())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(12, "Cannot allocate memory")])
def test_memory_for_keys_and_values_is_there_from_the_start_or_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    scheduler = make_scheduler(model, slots=3, context=64)
    assert (
        scheduler.runner._cache.position_bytes * 3 * 64 == 2 * 2 * 3 * 64 * 64 * 4
    )  # layers, keys and values, slots, context, width, bytes
    allocate = KvCache._allocate

    def too_small(memory: KvCache, like: Any) -> Any:
        if memory.context == 64:
            raise error
        return allocate(memory, like)

    monkeypatch.setattr(KvCache, "_allocate", too_small)
    with pytest.raises(
        ModelError, match=r"keys and values of 3 contexts of 64 tokens take 0\.0 GB, and there is not so much memory"
    ):
        make_scheduler(model, slots=3, context=64)


def test_the_examples_of_the_module(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[tuple[int, int]]] = []

    def recording(*args: Any) -> torch.Tensor:
        passes.append([(chunk.slot, len(chunk.ids)) for chunk in args[2]])
        return compute_logits(*args)

    compute_logits = causal.compute_logits
    monkeypatch.setattr(causal, "compute_logits", recording)
    scheduler = make_scheduler(model, slots=3, context=64, prefill_tokens=4)
    scheduler.submit("A", GenerationRequest([5], 20))
    scheduler.step()
    passes.clear()
    scheduler.submit("B", GenerationRequest([6, 7, 8, 9, 10, 11], 20))
    scheduler.submit("C", GenerationRequest([12, 13, 14], 20))
    keys = [[token.key for token in scheduler.step()] for _ in range(3)]
    assert passes == [[(0, 1), (1, 4)], [(0, 1), (1, 2)], [(0, 1), (1, 1), (2, 3)]]
    assert keys == [["A"], ["A", "B"], ["A", "B", "C"]]
