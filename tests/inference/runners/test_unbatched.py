"""Models behind virtual tokens: replies and scores are those of their own full forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apprentice.errors import ModelError
from apprentice.inference.choices.choice_scoring import choice_logprobs, unbatched_logprob
from apprentice.inference.decoding import generate, make_scheduler
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, Sampling
from apprentice.inference.runners.causal import CausalRunner
from apprentice.inference.runners.encoder_decoder import EncoderDecoderRunner
from apprentice.inference.runners.unbatched import UnbatchedRunner
from apprentice.inference.scheduler import Scheduler
from apprentice.models.model_kind import has_virtual_tokens
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Tuning
from tests.models.architectures import made

PROMPTS = [[(11 * length + 7 * place) % 60 + 3 for place in range(length)] for length in (5, 1, 13, 2)]
KINDS = [("llama", "prefix"), ("llama", "prompt"), ("gpt2", "prompt"), ("t5_v1.1", "prefix"), ("t5_v1.1", "prompt")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def model(request: pytest.FixtureRequest) -> Any:
    name, method = request.param
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wrapped = TUNING_METHODS[method].wrap(made(name), Tuning(method=method, virtual_tokens=4), 3).eval()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)  # what was learnt must show
    return wrapped


def logits_after(model: Any, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """(1 + reply, vocabulary), from one forward pass without a cache."""
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start + reply]), use_cache=False)
            return output.logits[0]
        return model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0][-len(reply) - 1 :]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids: list[int] = []
    for _ in range(count):
        ids.append(int(logits_after(model, prompt, ids)[-1].argmax()))
    return ids


def of(tokens: list[GeneratedToken], key: str) -> list[GeneratedToken]:
    return [token for token in tokens if token.key == key]


def drained(scheduler: Scheduler) -> list[GeneratedToken]:
    tokens: list[GeneratedToken] = []
    while scheduler.running or scheduler.waiting:
        tokens += scheduler.step()
    return tokens


def test_replies_are_the_models_own(model: Any) -> None:
    assert isinstance(make_scheduler(model, slots=1, context=32).runner, UnbatchedRunner)
    whole = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert not torch.allclose(logits_after(model, PROMPTS[0], []), logits_after(model, PROMPTS[2], []), atol=1e-3)
    assert generate(model, PROMPTS, max_new_tokens=6, stop_ids=(), max_running=2) == whole
    stop = whole[0][3]
    assert generate(model, PROMPTS[:1], max_new_tokens=6, stop_ids=[stop]) == [whole[0][: whole[0].index(stop)]]


def test_scores_are_those_of_full_forward_passes(model: Any) -> None:
    choices = [[7, 9, 4], [8], [7, 9]]
    expected = [
        float(sum(logits_after(model, PROMPTS[0], ids)[:-1].log_softmax(-1)[place, id] for place, id in enumerate(ids)))
        for ids in choices
    ]
    assert [unbatched_logprob(model, PROMPTS[0], ids) for ids in choices] == pytest.approx(expected, abs=1e-4)
    assert choice_logprobs(model, [PROMPTS[0]], [choices])[0] == pytest.approx(expected, abs=1e-4)
    scheduler = make_scheduler(model, slots=2, context=32)
    for place, ids in enumerate(choices):
        scheduler.submit(place, GenerationRequest((*PROMPTS[0], *ids), 1, logprobs=0, score_from=len(PROMPTS[0])))
    tokens = drained(scheduler)
    assert [sum(score.logprob or 0.0 for score in token.prompt_scores) for token in tokens] == pytest.approx(expected, abs=1e-4)
    assert [[score.id for score in token.prompt_scores] for token in tokens] == choices


def test_sampled_replies_do_not_depend_on_company(model: Any) -> None:
    generations = [GenerationRequest(prompt, 5, (), Sampling(temperature=1.0, seed=place)) for place, prompt in enumerate(PROMPTS)]
    together = make_scheduler(model, slots=4, context=32)
    for place, request in enumerate(generations):
        together.submit(str(place), request)
    tokens = drained(together)
    for place, request in enumerate(generations):
        alone = make_scheduler(model, slots=1, context=32)
        alone.submit(str(place), request)
        assert [token.id for token in drained(alone)] == [token.id for token in of(tokens, str(place))]


def test_a_cancelled_request_leaves_nothing(model: Any) -> None:
    scheduler = make_scheduler(model, slots=1, context=32)
    assert isinstance(scheduler.runner, UnbatchedRunner)
    scheduler.submit("gone", GenerationRequest(PROMPTS[0], 5))
    scheduler.submit("next", GenerationRequest(PROMPTS[1], 2))
    scheduler.step()
    assert scheduler.used_tokens > 0
    scheduler.cancel("gone")
    assert [token.id for token in drained(scheduler)] == greedy(model, PROMPTS[1], 2)
    assert (scheduler.runner._caches, scheduler.used_tokens) == ({}, 0)


def test_a_prompt_that_is_only_read_has_no_probabilities() -> None:
    wrapped = TUNING_METHODS["prompt"].wrap(made("t5_v1.1"), Tuning(method="prompt", virtual_tokens=4), 3).eval()
    scheduler = make_scheduler(wrapped, slots=1, context=32)
    with pytest.raises(ModelError, match="gives no probabilities to the prompt it reads"):
        scheduler.submit("echo", GenerationRequest(PROMPTS[0], 1, logprobs=2, score_from=0))


def test_others_share_passes() -> None:
    model = made("llama")
    assert not has_virtual_tokens(model)
    assert type(make_scheduler(model, slots=1, context=32).runner) is CausalRunner
    assert type(make_scheduler(made("t5_v1.1"), slots=1, context=32).runner) is EncoderDecoderRunner
    with_adapter = TUNING_METHODS["adapter"].wrap(model, Tuning(method="adapter", width=4), 3)
    assert type(make_scheduler(with_adapter.eval(), slots=1, context=32).runner) is CausalRunner
