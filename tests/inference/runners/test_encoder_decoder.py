"""Requests of encoder-decoders join and leave a running batch; replies and scores are those they would have alone."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch

from apprentice.errors import ModelError
from apprentice.inference.choices.seq2seq_scoring import seq2seq_logprobs
from apprentice.inference.decoding import generate, make_scheduler
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, Sampling
from apprentice.inference.runners.encoder_decoder import probe_encoder_decoder
from apprentice.inference.scheduler import Scheduler
from tests.models.architectures import SEQ2SEQ, made

PROMPTS = [[(11 * length + 7 * place) % 480 + 3 for place in range(length)] for length in (1, 5, 40, 13, 2, 27, 8, 60, 3, 19)]


@pytest.fixture(params=sorted(SEQ2SEQ), scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def drain(scheduler: Scheduler, replies: dict[Hashable, list[GeneratedToken]]) -> None:
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            replies.setdefault(token.key, []).append(token)


def decoded(model: Any, generations: list[GenerationRequest], slots: int) -> list[list[GeneratedToken]]:
    scheduler = make_scheduler(model, slots=slots, context=128)
    for key, generation in enumerate(generations):
        scheduler.submit(key, generation)
    replies: dict[Hashable, list[GeneratedToken]] = {}
    drain(scheduler, replies)
    return [replies[key] for key in range(len(generations))]


def ids(replies: list[list[GeneratedToken]]) -> list[list[int]]:
    return [[token.id for token in reply] for reply in replies]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The plain way: both texts through the whole model for every token."""
    said = [model.config.decoder_start_token_id]
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([said]), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
    return said[1:]


def test_company_does_not_matter_and_replies_are_the_models_own(model: Any) -> None:
    generations = [GenerationRequest(prompt, 14) for prompt in PROMPTS]
    alone = [ids(decoded(model, [one], 1))[0] for one in generations]
    for slots in (3, 10):  # with three, requests join and leave between steps
        assert ids(decoded(model, generations, slots)) == alone
    assert alone == [greedy(model, prompt, 14) for prompt in PROMPTS]


def test_each_prompt_is_read_once_and_those_that_wait_together(model: Any) -> None:
    reads: list[list[int]] = []
    encoder = model.get_encoder()
    hook = encoder.register_forward_pre_hook(lambda _, __, named: reads.append(named["input_ids"][0].tolist()), with_kwargs=True)
    try:
        scheduler = make_scheduler(model, slots=2, context=64)
        reads.clear()  # of the check that comes first
        for key in range(3):
            scheduler.submit(key, GenerationRequest(PROMPTS[key], 5))
        replies: dict[Hashable, list[GeneratedToken]] = {}
        drain(scheduler, replies)
    finally:
        hook.remove()
    assert reads == [PROMPTS[0] + PROMPTS[1], PROMPTS[2]]
    assert [len(replies[key]) for key in range(3)] == [5, 5, 5]


def test_a_reply_ends_at_its_stop_id_and_at_the_context(model: Any) -> None:
    (whole,) = ids(decoded(model, [GenerationRequest(PROMPTS[3], 12)], 1))
    stop = whole[4]
    ((*_, last),) = decoded(model, [GenerationRequest(PROMPTS[3], 12, frozenset([stop]))], 1)
    assert (last.id, last.finish) == (stop, "stop")
    scheduler = make_scheduler(model, slots=1, context=16)
    scheduler.submit("full", GenerationRequest(PROMPTS[1], 100))
    replies: dict[Hashable, list[GeneratedToken]] = {}
    drain(scheduler, replies)
    assert (len(replies["full"]), replies["full"][-1].finish) == (16, "length")


def test_sampled_replies_do_not_depend_on_company(model: Any) -> None:
    generations = [GenerationRequest(prompt, 8, sampling=Sampling(0.9, 0.95, seed)) for seed, prompt in enumerate(PROMPTS)]
    assert ids(decoded(model, generations, 4)) == [ids(decoded(model, [one], 1))[0] for one in generations]


def test_choices_are_scored_as_evaluation_scores_them(model: Any) -> None:
    choices = [[7, 9, 2], [5], [8, 8, 8, 8, 2]]
    expected = [seq2seq_logprobs(model, [prompt], [choices], 4096)[0] for prompt in PROMPTS[:4]]
    generations = [
        GenerationRequest([*prompt, *choice], 1, logprobs=0, score_from=len(prompt)) for prompt in PROMPTS[:4] for choice in choices
    ]
    scores = [sum(score.logprob or 0.0 for score in reply[0].prompt_scores) for reply in decoded(model, generations, 5)]
    assert scores == pytest.approx([value for group in expected for value in group], abs=1e-3)


def test_cancelled_requests_give_their_slot_back(model: Any) -> None:
    scheduler = make_scheduler(model, slots=1, context=64)
    scheduler.submit("one", GenerationRequest(PROMPTS[1], 50))
    scheduler.submit("two", GenerationRequest(PROMPTS[2], 3))
    scheduler.step()
    scheduler.cancel("one")
    replies: dict[Hashable, list[GeneratedToken]] = {}
    drain(scheduler, replies)
    assert (list(replies), scheduler.running) == (["two"], 0)
    assert ids([replies["two"]]) == ids(decoded(model, [GenerationRequest(PROMPTS[2], 3)], 1))


def test_the_prompts_own_probabilities_are_refused() -> None:
    scheduler = make_scheduler(made("t5"), slots=1, context=64)
    with pytest.raises(ModelError, match="gives no probabilities to the prompt"):
        scheduler.submit("one", GenerationRequest([3, 4], 1, logprobs=0, score_from=0))


def test_a_model_that_counts_otherwise_is_refused() -> None:
    model = made("bart")
    places = model.get_decoder().embed_positions
    model.get_decoder().embed_positions = torch.nn.Embedding(*places.weight.shape)
    with pytest.raises(ModelError, match="BartForConditionalGeneration cannot be served here"):
        make_scheduler(model, slots=1, context=64)


@pytest.mark.parametrize("prompts", [PROMPTS])
def test_evaluation_writes_as_the_endpoint_does_whatever_generation_config_says(model: Any, prompts: list[list[int]]) -> None:
    config = model.generation_config
    was = config.to_dict()
    try:
        config.no_repeat_ngram_size, config.forced_bos_token_id, config.forced_eos_token_id, config.num_beams = 2, 7, 9, 4
        replies = generate(model, prompts, max_new_tokens=8, stop_ids=(1,))
    finally:
        config.update(**was)
    served = ids(decoded(model, [GenerationRequest(prompt, 8, frozenset([1])) for prompt in prompts], 4))
    assert replies == [[token for token in reply if token != 1] for reply in served]
    assert replies == [generate(model, [prompt], max_new_tokens=8, stop_ids=(1,))[0] for prompt in prompts]


def test_what_cannot_share_a_pass_is_evaluated_alone() -> None:
    import transformers as hf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 500, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2}
        umt5 = hf.UMT5ForConditionalGeneration(hf.UMT5Config(**sizes, decoder_start_token_id=0)).eval()
    with pytest.raises(ModelError, match="UMT5ForConditionalGeneration cannot be served here"):
        make_scheduler(umt5, slots=1, context=64)
    assert generate(umt5, PROMPTS[:4], max_new_tokens=6, stop_ids=()) == [greedy(umt5, prompt, 6) for prompt in PROMPTS[:4]]


def test_prompts_and_replies_of_all_requests_stay_within_the_limit(model: Any) -> None:
    position_bytes = probe_encoder_decoder(model).position_bytes  # on both sides together
    scheduler = make_scheduler(model, slots=8, context=80, kv_bytes=80 * position_bytes)
    assert (scheduler.context, scheduler.kv_tokens) == (80, 160)
    for key, prompt in enumerate(PROMPTS):
        scheduler.submit(key, GenerationRequest(prompt, 30))
    replies: dict[Hashable, list[GeneratedToken]] = {}
    most_reserved = 0
    while scheduler.running or scheduler.waiting:
        for token in scheduler.step():
            replies.setdefault(token.key, []).append(token)
        most_reserved = max(most_reserved, scheduler.reserved_tokens)
        assert scheduler.used_tokens <= scheduler.reserved_tokens <= 160
    assert most_reserved == (1 + 31) + (5 + 31) + (40 + 31)  # the first three prompts, with their replies and start tokens
    assert ids([replies[key] for key in range(len(PROMPTS))]) == [greedy(model, prompt, 30) for prompt in PROMPTS]


def test_a_long_prompt_does_not_shorten_what_its_reply_reserves(model: Any) -> None:
    scheduler = make_scheduler(model, slots=1, context=64)
    scheduler.submit("long", GenerationRequest(PROMPTS[7], 50))
    scheduler.step()
    assert scheduler.reserved_tokens == 60 + 51
    replies: dict[Hashable, list[GeneratedToken]] = {}
    drain(scheduler, replies)
    assert len(replies["long"]) == 49
