"""Commands on the HTTP endpoint: serve, ask, key."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from apprentice.cli.completion import complete_run
from apprentice.cli.options import Json, Storage, Trust, screen_for


def serve(
    target: Annotated[
        str, typer.Argument(help="A run or a model (folder or hub id).", metavar="RUN|MODEL", autocompletion=complete_run)
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    engine: Annotated[
        Literal["transformers", "vllm"] | None, typer.Option(help="What decodes; the recipe's serving.engine by default.")
    ] = None,
    contract: Annotated[str | None, typer.Option(help="Run whose prompt contract a bare model takes.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose layout a bare model takes.")] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Folder or URI with LoRA adapters of the model; `model` in a request names one.")
    ] = None,
    beside: Annotated[list[str] | None, typer.Option(help="A further run or model at the same endpoint; may be repeated.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads that one replica decodes with; serving.threads by default.")
    ] = None,
    require_gate: Annotated[bool, typer.Option(help="Refuse a model that has not passed its recipe's `evaluation.gate`.")] = False,
    storage: Storage = "./runs",
    insecure: Annotated[bool, typer.Option(help="Let an address other than loopback do without keys.")] = False,
    trust: Trust = False,
) -> None:
    """Serve a model: endpoint and playground on one port, until Ctrl-C."""
    from apprentice import pipeline

    screen = screen_for(as_json=False)
    with pipeline.run_endpoint(
        target,
        host=host,
        port=port,
        engine=engine,
        contract=contract,
        recipe=recipe,
        adapters=adapters,
        beside=beside,
        threads=threads,
        storage=storage,
        require_gate=require_gate,
        insecure=insecure,
        trust=trust,
        progress=screen.progress,
    ) as url:
        screen.say(f"serving {target} at {url}  (playground: {url}/, API: {url}/v1, stop with Ctrl-C)")
        pipeline.wait_for_stop()
    screen.say("stopped")


def ask(
    instruction: Annotated[str, typer.Argument(help="What to do.")],
    input: Annotated[str, typer.Option(help="What to do it with.")] = "",
    url: Annotated[str, typer.Option(help="A running endpoint.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 128,
    key: Annotated[str | None, typer.Option(envvar="APPRENTICE_API_KEY", help="API key, if the endpoint wants one.")] = None,
    json: Json = False,
) -> None:
    """Send one request to a running endpoint."""
    from apprentice import pipeline

    screen = screen_for(json)
    reply = pipeline.ask_endpoint(url, instruction, input, max_tokens=max_tokens, key=key)
    screen.result({"reply": reply}, reply)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    json: Json = False,
) -> None:
    """Make a new API key, shown once, and its entry for the keys file."""
    from apprentice.serve.api.limits.api_keys import KEYS_FILE, new_key

    made, entry = new_key(name)
    where = f"Keep it now: only its hash is stored. Add this under `keys:` in the file that {KEYS_FILE} names:"
    shown = f"key: {made}\n\n{where}\n\n{entry}"
    screen_for(json).result({"key": made, "entry": entry}, shown)
