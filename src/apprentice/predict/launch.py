"""Batch prediction on Ray Data: a pool of workers answers chunks of the input; each chunk is written as one Parquet part.

A rerun keeps the parts that exist and computes the others. Ray must be initialised by the caller.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import EvaluationError
from apprentice.model_pool.actors import find_free_resources, map_tables, resolve_model_dtype
from apprentice.model_pool.answer_settings import TokenLimits
from apprentice.model_pool.engine_choice import choose_pool_engine
from apprentice.model_pool.model import plan_pool
from apprentice.predict.predictor import Predictor, part_file
from apprentice.predict.rows import file_sha256, split_into_chunks
from apprentice.recipe import Model, Serving
from apprentice.run.contract import weights_sha256
from apprentice.storage import Folder

STATE_FILE = "predict.json"  # input, model and settings that the parts in a folder were made from
BAD_ROWS_FILE = "bad_rows.jsonl"
_DEFAULTS = Serving()
Progress = Callable[[dict[str, Any]], None]


def predict(
    file: Folder,
    out: Folder,
    folder: Path,
    model: Model,
    layout: Layout,
    limits: TokenLimits,
    *,
    restart: bool,
    progress: Progress,
    serving: Serving = _DEFAULTS,
    gpus: float = 0.0,
) -> dict[str, Any]:
    """Writes replies of the model in `folder` to every row of `file`, as Parquet parts in `out`; returns a summary.

    Rows without a reply are listed in `bad_rows.jsonl`. A second call with the same arguments computes only the missing parts;
    `restart` deletes `out` first. `serving` names the engine and how many GPUs the model is split over, `gpus` is what the recipe
    asks for. Raises `DataError` for a file that cannot be read, `EvaluationError` where `out` has replies to another input, model
    or setting, or the model cannot answer, `ResourcesError` where no worker fits, `ServingError` where the model cannot be split.
    """
    chunks = split_into_chunks(file)
    resources = find_free_resources(partial(_tell, progress), gpus=gpus, tensor_parallel=serving.tensor_parallel)
    choice = choose_pool_engine(serving, folder, on_gpu=resources.gpus > 0)
    model = resolve_model_dtype(model, resources)
    state: dict[str, Any] = {
        "input": str(file),
        "sha256": file_sha256(file),
        "weights_sha256": weights_sha256(folder),
        "dtype": model.dtype,
        "layout": layout.name,
        "max_new_tokens": limits.reply,
        "prompt_tokens": limits.prompt,
        "rows": sum(chunk.rows for chunk in chunks),
        "engine": choice.name,
    }
    if restart:
        out.delete()
    _check_state(out, state)
    (out / STATE_FILE).write_json(state)
    left = [chunk for chunk in chunks if not part_file(out, chunk.number).exists()]
    if len(left) < len(chunks):
        progress({"message": f"{len(chunks) - len(left)} of {len(chunks)} parts were there already"})
    started, done = time.monotonic(), 0
    total = sum(chunk.rows for chunk in left)
    if left:
        pool, words = plan_pool(folder, model.dtype, choice, serving, resources, len(left))
        tables = [pa.Table.from_pylist([asdict(chunk)]) for chunk in left]
        progress({"message": words})
        for block in map_tables(tables, Predictor, (folder, model, layout, limits, file, out, pool), pool):
            for line in block.to_pylist():
                if line["failure"]:
                    raise EvaluationError(line["failure"])
                done += line["rows"]
            progress({"message": f"{done} of {total} rows", "eta_s": (time.monotonic() - started) * (total / max(1, done) - 1)})
    bad = _collect_bad(out, len(chunks))
    result = {"out": str(out), "rows": state["rows"], "parts": len(chunks), "bad_rows": bad, "made_now": done}
    progress({"message": f"{state['rows'] - bad} of {state['rows']} rows have a reply", "done": True})
    return result


def _tell(progress: Progress, message: str) -> None:
    progress({"message": message})


def _check_state(out: Folder, state: dict[str, Any]) -> None:
    file = out / STATE_FILE
    if not file.exists():
        return
    # Earlier versions did not store the dtype, and later ones not the engine, which was our own.
    old = {"dtype": state["dtype"], "engine": "transformers", **file.read_json()}
    if changed := sorted(key for key in state.keys() - {"input"} if old.get(key) != state[key]):
        raise EvaluationError(
            f"{out} holds replies to something else ({', '.join(changed)} changed);"
            " choose another --out, or start over with --restart."
        )


def _collect_bad(out: Folder, parts: int) -> int:
    """Writes the rows without a reply to `BAD_ROWS_FILE`, a JSON line each with the reason; returns their number."""
    lines = []
    for number in range(parts):
        table = pq.read_table(io.BytesIO(part_file(out, number).read_bytes()), columns=["row", "problem"])
        lines += [json.dumps(record, ensure_ascii=False) for record in table.to_pylist() if record["problem"]]
    (out / BAD_ROWS_FILE).write_text("".join(f"{line}\n" for line in lines))
    return len(lines)
