"""Asking an endpoint: what it says, and what becomes of one that is down, slow or says nonsense."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from apprentice.data.corpus import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate import endpoint as asking
from apprentice.evaluate.endpoint import Endpoint, EndpointScorer, model_at
from apprentice.evaluate.predictions import table_of
from apprentice.evaluate.scorer import ASKED, Manner

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that answers every POST with `answer(body)`; gives its address and the bodies that came."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            self._send(*answer(body))

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": "served"}]}).encode())

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "WAIT_S", 0.001)


def asked(scorer: EndpointScorer, count: int = 1, *, ranked: bool = True) -> list[dict[str, Any]]:
    question: dict[str, Any] = {"prompt_ids": [5, 6, 7], "choices": ["no", "yes"], "choice_ids": [[8, 2], [9, 9, 2]]}
    if not ranked:
        question |= {"choices": [], "choice_ids": []}
    found: list[dict[str, Any]] = scorer(table_of([{"place": n, **question} for n in range(count)], ASKED)).to_pylist()
    return found


def echo(body: dict[str, Any]) -> tuple[int, bytes]:
    """Every token has the log-probability -id/10, the first none, and one more token is made."""
    values = [None, *[-token / 10 for token in body["prompt"][1:]], -0.5]
    return 200, json.dumps({"choices": [{"text": " a reply ", "logprobs": {"token_logprobs": values}}]}).encode()


def test_choices_are_summed_over_their_own_tokens(corpus: Corpus) -> None:
    with server(echo) as (url, seen):
        [found] = asked(EndpointScorer(Endpoint(url, "m"), Manner(corpus.layout, 6)))
    assert found["choice_logprobs"] == pytest.approx([-1.0, -2.0])
    assert (found["unscored"], found["choice_priors"]) == (None, None)
    assert [body["prompt"] for body in seen] == [[5, 6, 7, 8, 2], [5, 6, 7, 9, 9, 2]]
    assert all((body["model"], body["echo"], body["logprobs"]) == ("m", True, 1) for body in seen)


def test_priors_are_asked_once_for_equal_choices(corpus: Corpus) -> None:
    manner = Manner(corpus.layout, 6, priors=True)
    scorer = EndpointScorer(Endpoint("http://127.0.0.1:9", "m"), manner)
    with server(echo) as (url, seen):
        scorer = EndpointScorer(Endpoint(url, "m"), manner)
        [first] = asked(scorer)
        asked(scorer)
    assert first["choice_priors"] == pytest.approx([-1.0, -2.0])
    assert len(seen) == 2 + 2 + 2


def test_replies_are_text(corpus: Corpus) -> None:
    with server(echo) as (url, seen):
        [found] = asked(EndpointScorer(Endpoint(f"{url}/v1", "m"), Manner(corpus.layout, 6)), ranked=False)
    assert found["prediction"] == "a reply"
    assert (seen[0]["max_tokens"], seen[0]["temperature"]) == (6, 0)


def body(text: str, status: int = 200) -> Answer:
    return lambda _: (status, text.encode())


NONSENSE = {
    "not_json": (body("<html>"), "not JSON", asking.TRIES),
    "no_logprobs": (body('{"choices": [{"text": "a", "logprobs": null}]}'), "no log-probabilities", 1),
    "empty": (body("{}"), "no log-probabilities", 1),
    "too_few": (body('{"choices": [{"logprobs": {"token_logprobs": [null, -1.0]}}]}'), "2 log-probabilities for 5 tokens", 1),
    "positive": (body('{"choices": [{"logprobs": {"token_logprobs": [null, -1, -1, 3, 4]}}]}'), "impossible", 1),
    "not_a_number": (body('{"choices": [{"logprobs": {"token_logprobs": [null, -1, -1, NaN, -1]}}]}'), "impossible", 1),
    "refused": (body('{"error": "echo is not supported"}', 400), "answered 400: .*echo is not supported", 1),
    "overloaded": (body("", 503), f"answered 503, {asking.TRIES} times", asking.TRIES),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_unscored_after_few_tries(corpus: Corpus, name: str) -> None:
    answer, words, tries = NONSENSE[name]
    with server(answer) as (url, seen):
        [found] = asked(EndpointScorer(Endpoint(url, "m"), Manner(corpus.layout, 6)))
    assert found["choice_logprobs"] is None

    assert re.search(words, found["unscored"]), found
    assert len(seen) == tries


def test_one_that_stumbles_once_is_scored(corpus: Corpus) -> None:
    calls = []

    def stumbling(asked_body: dict[str, Any]) -> tuple[int, bytes]:
        calls.append(1)
        return (500, b"") if len(calls) == 1 else echo(asked_body)

    with server(stumbling) as (url, _):
        [found] = asked(EndpointScorer(Endpoint(url, "m"), Manner(corpus.layout, 6)))
    assert found["choice_logprobs"] == pytest.approx([-1.0, -2.0])


def test_one_that_is_down_is_given_up_soon(corpus: Corpus) -> None:
    with server(echo) as (url, _):
        pass  # the port is free again
    scorer = EndpointScorer(Endpoint(url, "m", timeout_s=1.0), Manner(corpus.layout, 6))
    found = asked(scorer, 60)
    assert len(found) == 60
    assert all("did not answer" in answer["unscored"] or "in a row came to nothing" in answer["unscored"] for answer in found)
    assert sum("in a row" in answer["unscored"] for answer in found) >= 60 - asking.GIVE_UP_AFTER - asking.AT_ONCE


def test_one_that_is_slow_is_not_waited_for(corpus: Corpus) -> None:
    released = threading.Event()

    def slow(asked_body: dict[str, Any]) -> tuple[int, bytes]:
        released.wait(30)
        return echo(asked_body)

    with server(slow) as (url, seen):
        [found] = asked(EndpointScorer(Endpoint(url, "m", timeout_s=0.2), Manner(corpus.layout, 6)))
        released.set()
    assert found["unscored"] == f"the endpoint did not answer (ReadTimeout), {asking.TRIES} times"
    assert len(seen) == asking.TRIES


def test_the_served_model_is_found_by_asking() -> None:
    with server(echo) as (url, _):
        assert model_at(url) == model_at(f"{url}/v1") == "served"
    with pytest.raises(EvaluationError, match="no model list at"):
        model_at(url, timeout_s=1.0)
