"""Asking an endpoint: what it says, and what becomes of one that is down, slow or says nonsense."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.corpus import Corpus
from apprentice.errors import EvaluationError
from apprentice.evaluate.questions import evaluation_subjects
from apprentice.evaluate.questions.evaluation_subjects import Subject, make_subject_settings, subject_entry
from apprentice.evaluate.report.predictions import make_table
from apprentice.evaluate.scoring import endpoint as asking
from apprentice.evaluate.scoring.endpoint import EndpointAddress, EndpointScorer, model_at, weights_at
from apprentice.evaluate.scoring.scorer import QUESTION_BLOCK
from apprentice.model_pool.answer_settings import AnswerSettings
from apprentice.recipe import Recipe

Answer = Callable[[dict[str, Any]], tuple[Any, ...]]  # status, body, and perhaps headers


@contextmanager
def server(
    answer: Answer, contract: bytes | None = None, headers_seen: list[dict[str, str]] | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that answers every POST with `answer(body)`; gives its address and the bodies that came."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if headers_seen is not None:
                headers_seen.append({name.lower(): value for name, value in self.headers.items()})
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            self._send(*answer(body))

        def do_GET(self) -> None:
            if self.path.startswith("/v1/contract"):
                requests.append({"path": self.path})
                self._send(404 if contract is None else 200, contract or b"")
            else:
                self._send(200, json.dumps({"data": [{"id": "served"}]}).encode())

        def _send(self, status: int, content: bytes, headers: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 4 * asking.AT_ONCE  # with the default of 5 the kernel drops connections of 16 threads for a second

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WAIT_S": 0.001, "LONGEST_WAIT_S": 0.01, "PATIENCE_S": 0.3, "FAULT_PATIENCE_S": 0.05}.items():
        monkeypatch.setattr(asking, name, value)


def ask(scorer: EndpointScorer, count: int = 1, *, ranked: bool = True) -> list[dict[str, Any]]:
    question: dict[str, Any] = {"prompt_ids": [5, 6, 7], "choices": ["no", "yes"], "choice_ids": [[8, 2], [9, 9, 2]]}
    if not ranked:
        question |= {"choices": [], "choice_ids": []}
    answers: list[dict[str, Any]] = scorer(make_table([{"place": n, **question} for n in range(count)], QUESTION_BLOCK)).to_pylist()
    return answers


def echo(body: dict[str, Any]) -> tuple[int, bytes]:
    """Every token has the log-probability -id/10, the first none, and one more token is made."""
    values = [None, *[-token / 10 for token in body["prompt"][1:]], -0.5]
    return 200, json.dumps({"choices": [{"text": " a reply ", "logprobs": {"token_logprobs": values}}]}).encode()


def test_choices_are_summed_over_their_own_tokens(corpus: Corpus) -> None:
    with server(echo) as (url, requests):
        [answer] = ask(EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6)))
    assert answer["choice_logprobs"] == pytest.approx([-1.0, -2.0])
    assert (answer["unscored"], answer["choice_priors"]) == (None, None)
    assert [body["prompt"] for body in requests] == [[5, 6, 7, 8, 2], [5, 6, 7, 9, 9, 2]]
    assert all((body["model"], body["echo"], body["logprobs"]) == ("m", True, 1) for body in requests)


def test_priors_are_asked_once_for_equal_choices(corpus: Corpus) -> None:
    answer_settings = AnswerSettings(corpus.layout, 6, priors=True)
    scorer = EndpointScorer(EndpointAddress("http://127.0.0.1:9", "m"), answer_settings)
    with server(echo) as (url, requests):
        scorer = EndpointScorer(EndpointAddress(url, "m"), answer_settings)
        [first] = ask(scorer)
        ask(scorer)
    assert first["choice_priors"] == pytest.approx([-1.0, -2.0])
    assert len(requests) == 2 + 2 + 2


def test_replies_are_text(corpus: Corpus) -> None:
    with server(echo) as (url, requests):
        [answer] = ask(EndpointScorer(EndpointAddress(f"{url}/v1", "m"), AnswerSettings(corpus.layout, 6)), ranked=False)
    assert answer["prediction"] == "a reply"
    assert (requests[0]["max_tokens"], requests[0]["temperature"]) == (6, 0)


def body(text: str, status: int = 200) -> Answer:
    return lambda _: (status, text.encode())


NONSENSE = {
    "no_logprobs": (body('{"choices": [{"text": "a", "logprobs": null}]}'), "no log-probabilities"),
    "empty": (body("{}"), "no log-probabilities"),
    "too_few": (body('{"choices": [{"logprobs": {"token_logprobs": [null, -1.0]}}]}'), "2 log-probabilities for 5 tokens"),
    "positive": (body('{"choices": [{"logprobs": {"token_logprobs": [null, -1, -1, 3, 4]}}]}'), "impossible"),
    "not_a_number": (body('{"choices": [{"logprobs": {"token_logprobs": [null, -1, -1, NaN, -1]}}]}'), "impossible"),
    "refused": (body('{"error": "echo is not supported"}', 400), "answered 400: .*echo is not supported"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_unscored_at_once(corpus: Corpus, name: str) -> None:
    answer, words = NONSENSE[name]
    with server(answer) as (url, requests):
        [reply] = ask(EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6)))
    assert reply["choice_logprobs"] is None
    assert re.search(words, reply["unscored"]), reply
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (body("<html>"), "the endpoint's reply is not JSON"),
        (body("", 503), "the endpoint answered 503"),
        (body("", 500), "the endpoint answered 500"),
    ],
)
def test_what_may_pass_is_asked_again_until_patience_ends(
    corpus: Corpus, answer: Answer, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 1.0)
    monkeypatch.setattr(asking, "FAULT_PATIENCE_S", 1.0)
    with server(answer) as (url, requests):
        [reply] = ask(EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6)))
    assert re.fullmatch(rf"{words}, for \d s", reply["unscored"])
    assert len(requests) > 2


def test_an_outage_that_is_shorter_than_patience_loses_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more requests fail in a row than there are threads; each is asked again, and all have answers in the end."""
    monkeypatch.setattr(asking, "PATIENCE_S", 60.0)
    calls = []

    def down_at_first(body_sent: dict[str, Any]) -> tuple[Any, ...]:
        calls.append(1)
        return (503, b"") if len(calls) <= 4 * asking.AT_ONCE else echo(body_sent)

    with server(down_at_first) as (url, _):
        answers = ask(EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6)), 40)
    assert [answer["choice_logprobs"] for answer in answers] == [pytest.approx([-1.0, -2.0])] * 40
    assert not any(answer["unscored"] for answer in answers)


@pytest.mark.parametrize("after", ["7", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_the_endpoint_says_when_to_come_back(corpus: Corpus, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 60.0)
    slept: list[float] = []
    calls = []

    def busy_once(body_sent: dict[str, Any]) -> tuple[Any, ...]:
        calls.append(1)
        return (429, b"", {"Retry-After": after}) if len(calls) == 1 else echo(body_sent)

    with server(busy_once) as (url, _):
        scorer = EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6), sleep=slept.append)
        [answer] = ask(scorer, ranked=False)
    assert answer["prediction"] == "a reply"
    assert slept == [7.0 if after == "7" else 0.0]


def test_one_that_asks_for_more_than_patience_is_not_waited_for(corpus: Corpus) -> None:
    slept: list[float] = []
    with server(lambda _: (429, b"", {"Retry-After": "3600"})) as (url, requests):
        scorer = EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6), sleep=slept.append)
        [answer] = ask(scorer)
    assert answer["unscored"] == "the endpoint answered 429, for 0 s, and asks to come back in 3600 s"
    assert (slept, len(requests)) == ([], 1)


def test_one_that_stays_down_is_given_up_and_found_again_when_it_is_back(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    up = threading.Event()

    def answer(body_sent: dict[str, Any]) -> tuple[Any, ...]:
        return echo(body_sent) if up.is_set() else (503, b"")

    with server(answer) as (url, requests):
        scorer = EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6))
        answers = ask(scorer, 200)
        assert len(answers) == 200
        reasons = r"the endpoint (answered 503|did not answer \(\w+\)).*|not asked: the endpoint had not answered for 0 s"
        assert all(re.fullmatch(reasons, one["unscored"]) for one in answers)
        tried = len(requests)
        ask(scorer, 200)  # nobody waits for long any more: at most one try a question
        assert len(requests) - tried <= 200
        up.set()
        [first] = ask(scorer)
        assert first["choice_logprobs"] == pytest.approx([-1.0, -2.0])
        monkeypatch.setattr(asking, "PATIENCE_S", 60.0)  # a busy machine may lose a connection now
        assert [answer["unscored"] for answer in ask(scorer, 40)] == [None] * 40


def test_one_that_is_slow_is_not_waited_for(corpus: Corpus) -> None:
    released = threading.Event()

    def slow(body_sent: dict[str, Any]) -> tuple[int, bytes]:
        released.wait(30)
        return echo(body_sent)

    with server(slow) as (url, requests):
        [answer] = ask(EndpointScorer(EndpointAddress(url, "m", timeout_s=0.2), AnswerSettings(corpus.layout, 6)))
        released.set()
    assert re.fullmatch(r"the endpoint did not answer \((Read|Connect)Timeout\), for \d+ s", answer["unscored"])
    assert requests


def test_the_weights_are_those_that_the_endpoint_names() -> None:
    with server(echo, b'{"weights_sha256": "abc", "base_sha256": "def"}') as (url, requests):
        assert weights_at(EndpointAddress(f"{url}/v1", "a model")) == ("abc", "def")
    assert requests == [{"path": "/v1/contract?model=a+model"}]
    assert weights_at(EndpointAddress(url, "m"), timeout_s=1.0) is None  # down by now
    for contract in (None, b"<html>", b"[]", b"{}", b'{"weights_sha256": ""}', b'{"weights_sha256": null}'):
        with server(echo, contract) as (url, _):
            assert weights_at(EndpointAddress(url, "m")) is None


def test_answers_are_remembered_by_the_weights_and_not_by_the_name_alone(
    corpus: Corpus, recipe: Recipe, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same address and name, while what answers there changes."""
    subject = Subject("endpoint", tiny_model, (0,), EndpointAddress("http://there", "m"))
    requests = []
    for weights in (("old", None), ("new", None), ("old", None), ("old", "base"), None):
        monkeypatch.setattr(evaluation_subjects, "weights_at", lambda _, weights=weights: weights)
        subject_settings = make_subject_settings(subject, recipe, corpus)
        assert subject_entry(subject, subject_settings)["weights_sha256"] == (weights and weights[0])
        requests.append(subject_settings.fingerprint)
    assert requests[0] == requests[2]
    assert len({*requests}) == 4
    assert requests[-1] is None  # nobody knows what answers, so nothing is remembered


@pytest.mark.parametrize("key", [None, "its own"])
def test_no_key_goes_where_it_was_not_meant_to(corpus: Corpus, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would add what the environment has for OpenAI's own endpoint."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "of another endpoint")
    headers: list[dict[str, str]] = []
    with server(echo, headers_seen=headers) as (url, _):
        [answer] = ask(EndpointScorer(EndpointAddress(url, "m", key), AnswerSettings(corpus.layout, 6)), ranked=False)
    assert answer["prediction"] == "a reply"
    [sent] = headers
    assert sent.get("authorization") == (None if key is None else "Bearer its own")
    assert "of another endpoint" not in " ".join(sent.values())


def test_a_redirect_is_not_followed(corpus: Corpus) -> None:
    with server(lambda _: (307, b"", {"Location": "/elsewhere"})) as (url, requests):
        [answer] = ask(EndpointScorer(EndpointAddress(url, "m"), AnswerSettings(corpus.layout, 6)), ranked=False)
    assert answer["unscored"] == "the endpoint answered 307: "
    assert len(requests) == 1


def test_the_served_model_is_found_by_asking() -> None:
    with server(echo) as (url, _):
        assert model_at(url) == model_at(f"{url}/v1") == "served"
    with pytest.raises(EvaluationError, match="no model list at"):
        model_at(url, timeout_s=1.0)
    with pytest.raises(EvaluationError, match="no model list at"):
        model_at("http://[", timeout_s=1.0)
    assert weights_at(EndpointAddress("http://[", "m")) is None
