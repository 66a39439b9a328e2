"""The API of the pages Runs, One run and Reports over real run folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from apprentice.board.run_list import Board
from apprentice.board.server import board_app
from apprentice.pipeline import list_runs
from apprentice.run.fence import FenceEntry, FenceLog, Holder
from apprentice.storage import Folder


@pytest.fixture
def board(storage: Path) -> TestClient:
    return TestClient(board_app(Board(str(storage), price_per_hour=2.0)), base_url="http://localhost")


def test_the_list_is_what_the_command_prints_and_more(board: TestClient, storage: Path) -> None:
    listed = board.get("/api/runs").json()["runs"]
    assert [run["name"] for run in listed] == ["finished", "lora", "rounds", "stopped"]
    for run, printed in zip(listed, list_runs(str(storage)), strict=True):
        assert {key: run[key] for key in printed if key != "time"} == {
            key: value for key, value in printed.items() if key != "time"
        }
    assert listed[0]["state"] == "trained"
    assert listed[0]["tags"] == []
    assert listed[0]["holder"] is None


def test_gpu_hours_and_cost_come_from_the_ledger_of_time(board: TestClient, storage: Path) -> None:
    recipe = storage / "lora" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("gpus: 0.0", "gpus: 1.0"))
    status = json.loads((storage / "lora" / "status.json").read_text())
    seconds = {"steps": 3600.0, "starting": 1800.0, "down": 9999.0, "stopped": 9999.0}
    (storage / "lora" / "status.json").write_text(json.dumps(status | {"time": {"seconds": seconds}}))
    workers = int(recipe.read_text().split("workers: ")[1].split()[0])
    run = board.get("/api/runs/lora").json()
    assert run["gpu_hours"] == pytest.approx(1.5 * workers)
    assert run["cost"] == pytest.approx(3.0 * workers)


def test_a_change_names_what_happens_and_waits_for_a_yes(board: TestClient, storage: Path) -> None:
    before = board.put("/api/runs/lora/archive", json={"archived": True})
    assert before.status_code == 428
    confirm = before.json()["confirm"]
    assert confirm["sentence"] == "The run lora is archived: the list leaves it out, and no file is removed."
    assert not (storage / "lora" / "board.json").exists()
    other = board.put("/api/runs/finished/archive", json={"archived": True}, headers={"X-Confirm": confirm["token"]})
    assert other.status_code == 428  # a yes to one change is no yes to another
    identity = (storage / "lora" / "identity.json").read_bytes()
    assert board.put("/api/runs/lora/archive", json={"archived": True}, headers={"X-Confirm": confirm["token"]}).json()["archived"]
    assert board.get("/api/runs").json()["runs"][1]["archived"] is True
    assert (storage / "lora" / "identity.json").read_bytes() == identity


def test_tags_are_set_and_kept_beside_the_archive(board: TestClient) -> None:
    for path, body in (("tags", {"tags": ["good", "good", "to show"]}), ("archive", {"archived": True})):
        token = board.put(f"/api/runs/lora/{path}", json=body).json()["confirm"]["token"]
        assert board.put(f"/api/runs/lora/{path}", json=body, headers={"X-Confirm": token}).status_code == 200
    run = board.get("/api/runs/lora").json()
    assert (run["tags"], run["archived"]) == (["good", "to show"], True)
    assert board.put("/api/runs/lora/tags", json={"tags": [""]}).status_code == 422


@pytest.mark.parametrize("name", ["none", "..", "%2e%2e", "%2E%2E%2Fetc", "a%5Cb"])
def test_a_name_that_is_no_run_is_refused_in_a_sentence(board: TestClient, name: str) -> None:
    answer = board.get(f"/api/runs/{name}/series?metric=loss")
    assert answer.status_code == 404


def test_a_run_shows_its_series_events_and_ledger(board: TestClient) -> None:
    run = board.get("/api/runs/finished").json()
    assert {"loss", "grad_norm", "learning_rate"} <= set(run["series"])
    assert run["ledger"]["tasks"].keys() == {"moods", "prices"}
    assert "step-000008" in run["checkpoints"]
    series = board.get("/api/runs/finished/series", params={"metric": ["loss", "grad_norm"], "first": 3, "last": 6}).json()
    assert series["loss"]["steps"] == series["grad_norm"]["steps"] == [3, 4, 5, 6]


def test_the_stream_brings_new_records_while_the_run_is_held_and_ends_then(board: TestClient, storage: Path) -> None:
    folder = Folder.at(storage / "finished")
    holder = Holder.here("apprentice train finished.yaml")
    entry = FenceEntry(99, 99, 0, 0, holder, False, (), os.urandom(4).hex())
    assert FenceLog(folder).add(entry)
    assert f"process {holder.pid}" in board.get("/api/runs/finished").json()["holder"]
    steps = storage / "finished" / "steps.jsonl"
    record = json.loads(steps.read_text().splitlines()[1])
    board.get("/api/runs/finished/series?metric=loss")  # reads what is there
    with steps.open("a") as stream:
        stream.write(json.dumps(record | {"step": 9, "loss": 0.25}) + "\n" + '{"torn": ')
    assert FenceLog(folder).add(FenceEntry(100, 99, 0, 0, holder, True, (), os.urandom(4).hex()))
    text = board.get("/api/runs/finished/records").text
    name, data = text.split("\n\n")[0].split("\n")
    assert name == "event: records"
    assert [(each["step"], each["loss"]) for each in json.loads(data.removeprefix("data: "))] == [(9, 0.25)]
    assert text.endswith("event: end\ndata: {}\n\n")
    assert board.get("/api/runs/finished/series?metric=loss").json()["loss"]["steps"][-1] == 9


def test_questions_stand_side_by_side_and_are_filtered(board: TestClient) -> None:
    report = board.get("/api/reports/finished").json()
    everything = board.get("/api/reports/finished/questions", params={"count": 200}).json()
    assert everything["total"] > 0
    subjects = [subject["name"] for subject in report["subjects"]]
    assert all([reply["subject"] for reply in question["replies"]] == subjects for question in everything["questions"])
    counts = {
        outcome: board.get("/api/reports/finished/questions", params={"outcome": outcome}).json()["total"]
        for outcome in ("better", "worse", "same")
    }
    assert sum(counts.values()) == everything["total"]
    of_task = board.get("/api/reports/finished/questions", params={"task": "colours", "count": 200}).json()
    assert {question["task"] for question in of_task["questions"]} == {"colours"}
    assert 0 < of_task["total"] < everything["total"]


def test_the_html_report_stands_in_a_sandbox(board: TestClient, storage: Path) -> None:
    assert board.get("/api/reports/finished/html").status_code == 404  # of a version that wrote none
    (storage / "finished" / "report" / "report.html").write_text("<h1>Report</h1><script>steal()</script>")
    policy = board.get("/api/reports/finished/html").headers["content-security-policy"]
    assert "sandbox;" in policy
    assert "default-src 'none'" in policy


def test_the_api_is_described(board: TestClient) -> None:
    paths = board.get("/openapi.json").json()["paths"]
    assert {"/api/runs", "/api/runs/{name}", "/api/reports/{name}/questions"} <= paths.keys()
    assert board.get("/docs").status_code == board.get("/static/docs.js").status_code == 200
