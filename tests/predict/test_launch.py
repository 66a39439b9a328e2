"""A file through Ray Data with the tiny model: every row once, also after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import EvaluationError
from apprentice.model_pool.answer_settings import TokenLimits
from apprentice.predict import launch, rows
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Model
from apprentice.storage import Folder


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(ray_cluster: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "split_into_chunks", lambda file: rows.split_into_chunks(file, size=4))
    lines = [json.dumps({"instruction": f"Name colour {number}.", "input": "now"}) for number in range(10)]
    lines[5] = "{broken"
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(lines) + "\n")
    layout = Layout("chat", Tokenizer(tiny_model))
    model = Model(base=str(tiny_model), dtype="float32")
    out = Folder.at(tmp_path / "out")

    def run(reply: int = 5, *, restart: bool = False) -> dict[str, Any]:
        limits = TokenLimits(200, reply)
        result: dict[str, Any] = launch.predict(
            Folder.at(file), out, tiny_model, model, layout, limits, restart=restart, progress=lambda values: None
        )
        return result

    result = run()
    assert (result["rows"], result["parts"], result["bad_rows"], result["made_now"]) == (10, 3, 1, 10)
    tables = [pq.read_table(tmp_path / "out" / f"part-{number:06d}.parquet").to_pylist() for number in range(3)]
    whole = [record for table in tables for record in table]
    assert [record["row"] for record in whole] == list(range(10))
    assert [record["row"] for record in whole if record["prediction"] is None] == [5]
    assert all(isinstance(record["prediction"], str) for record in whole if record["row"] != 5)
    [bad] = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert (json.loads(bad)["row"], json.loads(bad)["problem"][:8]) == (5, "not JSON")

    (tmp_path / "out" / "part-000001.parquet").unlink()  # as if it had been stopped before this one
    again = run()
    assert (again["made_now"], again["bad_rows"]) == (4, 1)
    assert pq.read_table(tmp_path / "out" / "part-000001.parquet").to_pylist() == tables[1]
    with pytest.raises(EvaluationError, match="max_new_tokens changed"):
        run(6)
    assert run(6, restart=True)["made_now"] == 10


def test_parts_of_two_engines_are_not_mixed(tmp_path: Path) -> None:
    """An earlier version, which did not store the engine, had our own alone."""
    out = Folder.at(tmp_path)
    for stored, engine in (({"engine": "vllm"}, "transformers"), ({}, "vllm"), ({"engine": "transformers"}, "vllm")):
        (out / launch.STATE_FILE).write_json({"dtype": "bfloat16", **stored})
        with pytest.raises(EvaluationError, match=r"something else \(engine changed\)"):
            launch._check_state(out, {"dtype": "bfloat16", "engine": engine})
    (out / launch.STATE_FILE).write_json({"dtype": "bfloat16"})
    launch._check_state(out, {"dtype": "bfloat16", "engine": "transformers"})
