"""Checks of a server against a contract, by the routes that it has; what none of them shows is said to be unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from apprentice.models.greedy import GreedyReply
from apprentice.run.contract import GoldenPrompt
from apprentice.verify.contract_place import GREEDY_TOKENS, ContractPlace
from apprentice.verify.observations import Observation, compare_ids, compare_values, unseen
from apprentice.verify.servers import Apprentice, Server

TIE = 0.25  # logits; where the two best are nearer, a server in a 16-bit format may take the other
BIAS = 100.0  # makes any token the most probable


def check_server(server: Server, place: ContractPlace, *, trust: bool = False) -> Iterator[Observation]:
    """All observations of `server`."""
    if isinstance(server, Apprentice):
        yield from _check_own_contract(server, place)
    else:
        yield _check_template(server, place)
    for golden in place.contract.golden:
        yield _check_prompt(server, place, golden)
    yield from _check_special_tokens(server, place)
    for token in place.contract.stop_ids:
        yield _check_stop(server, place, token)
    yield from _check_greedy_text(server, place, trust=trust)


def _check_own_contract(server: Apprentice, place: ContractPlace) -> Iterator[Observation]:
    """Our own endpoint says which contract it follows."""
    seen, expected = server.contract(), place.contract.model_dump(mode="json")
    if expected["weights_sha256"] and seen["weights_sha256"]:
        yield compare_values("weights", "sha256", expected["weights_sha256"], seen["weights_sha256"])
    else:
        yield unseen("weights", "sha256", "the contract here or the server's names none")
    yield compare_values("tokenizer", "sha256", expected["tokenizer_sha256"], seen["tokenizer_sha256"])
    yield compare_values("chat template", "sha256", expected["chat_template_sha256"], seen["chat_template_sha256"])
    for name in ("layout", "layout_version", "system", "date", "control_tokens"):
        yield compare_values("prompt format", name, expected[name], seen[name])
    yield compare_values("stops", "stop_ids", expected["stop_ids"], seen["stop_ids"])


def _check_template(server: Server, place: ContractPlace) -> Observation:
    if place.contract.layout != "chat":
        return unseen("chat template", "sha256", f"layout `{place.contract.layout}` has none")
    template = server.chat_template()
    if template is None:
        return unseen("chat template", "sha256", f"{server.name} does not show it; the prompts below are made with it")
    return compare_values(
        "chat template", "sha256", place.contract.chat_template_sha256, hashlib.sha256(template.encode()).hexdigest()
    )


def _check_prompt(server: Server, place: ContractPlace, golden: GoldenPrompt) -> Observation:
    subject = golden.instruction if not golden.history else f"{golden.instruction} (after {len(golden.history)} turns)"
    is_chat = place.contract.layout == "chat"
    messages, text = (place.messages(golden), None) if is_chat else (None, place.text(golden))
    if isinstance(server, Apprentice) and not golden.history:
        ids = server.encode_instruction(golden.instruction, golden.input)
    elif messages is not None:
        ids = server.encode_messages(messages)
    elif text is None:
        return unseen("token ids", subject, f"layout `{place.contract.layout}` needs the tokenizer beside the contract")
    else:
        ids = server.encode_text(text)
    if ids is not None:
        return compare_ids(subject, golden.ids, ids)
    count = server.count_tokens(messages, text)
    if count is None:
        return unseen("token ids", subject, f"{server.name} shows neither token ids nor their number")
    if count != len(golden.ids):
        return Observation("token ids", subject, "drifted", f"{len(golden.ids)} ids expected, {count} counted")
    return unseen("token ids", subject, f"{server.name} shows their number alone, which is right ({count})")


def _check_special_tokens(server: Server, place: ContractPlace) -> Iterator[Observation]:
    """Texts of the stop tokens are these tokens for the server's tokenizer."""
    if place.layout is None:
        yield unseen("special tokens", "stop tokens", "no tokenizer lies beside the contract")
        return
    tokenizer = place.layout.tokenizer
    for token in place.contract.stop_ids:
        text = tokenizer.decode([token], skip_special=False)
        ids = server.encode_text(text)
        if ids is None:
            yield unseen("special tokens", text, f"{server.name} encodes no text for others")
        else:
            own = [*tokenizer.start_ids, token, *tokenizer.finish_ids]
            verdict: Observation = compare_ids(text, own, ids)
            is_same = verdict.verdict == "same" or list(ids) == [token]
            yield Observation(
                "special tokens", text, "same" if is_same else "drifted", str(ids) if is_same else f"{[token]} is {ids}"
            )


def _check_stop(server: Server, place: ContractPlace, token: int) -> Observation:
    """A reply that is made to begin with a stop token must end there."""
    ids, subject = place.contract.golden[0].ids, f"token {token}"
    plain, forced = server.complete(ids, 3), server.complete(ids, 3, {token: BIAS})
    if plain is None or forced is None:
        return unseen("stops", subject, f"{server.name} continues no token ids, or biases none")
    if forced == plain:
        return unseen("stops", subject, f"the reply is the same with `logit_bias` as without: {plain[0]!r}")
    if forced[1] == "stop":
        return Observation("stops", subject, "same", "a reply ends with it")
    return Observation("stops", subject, "drifted", f"a reply goes on after it: {forced[0]!r}")


def _check_greedy_text(server: Server, place: ContractPlace, *, trust: bool) -> Iterator[Observation]:
    if place.layout is None or not place.has_weights:
        yield unseen("greedy text", "all", "no weights lie beside the contract, to say what it should be")
        return
    if server.complete(place.contract.golden[0].ids, 1) is None:
        yield unseen("greedy text", "all", f"{server.name} continues no token ids")
        return
    replies = place.greedy_replies(trust=trust)
    for golden, reply in zip(place.contract.golden, replies, strict=True):
        answer = server.complete(golden.ids, GREEDY_TOKENS)
        if answer is None:
            yield unseen("greedy text", golden.instruction, f"{server.name} refuses this prompt")
        else:
            yield _compare_texts(place, golden.instruction, reply, answer[0])


def _compare_texts(place: ContractPlace, subject: str, reply: GreedyReply, seen: str) -> Observation:
    """The same text, or one that parts from it where the two best tokens are nearly equal."""
    assert place.layout is not None
    decode = place.layout.tokenizer.decode
    expected = decode(reply.ids)
    if expected.strip() == seen.strip():
        return Observation("greedy text", subject, "same", repr(expected))
    length = sum(seen.strip().startswith(decode(reply.ids[: count + 1]).strip()) for count in range(len(reply.ids)))
    margin = reply.margins[min(length, len(reply.margins) - 1)]
    if margin < TIE:
        return Observation("greedy text", subject, "same", f"the first {length} tokens; then the two best are {margin:.2f} apart")
    return Observation("greedy text", subject, "drifted", f"{expected!r} is {seen!r}, though by {margin:.2f} less likely")
