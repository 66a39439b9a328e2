"""Reading of conversations with functions, calls, results and thoughts from rows, in the forms that datasets have.

    OpenAI     messages with `tool_calls` and role `tool`, or `function_call` and `function`; `tools`; `reasoning_content`
    ShareGPT   turns from `function_call` and `observation`; `tools`
    Hermes     <tool_call>, <tool_response> and <tools> within the texts of ShareGPT's turns
    xLAM       columns query, tools and answers (APIGen), with the types of arguments as Python names

Lists and mappings may stand as JSON texts. Keys that are null are left out, since a table's column gives every row all keys.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from apprentice.errors import RowError
from apprentice.tasks.dialogue import Dialogue, DialogueTurn, ToolCall, read_calls
from apprentice.tasks.importers.schema_check import fault_in

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_RESULTS = ("tool", "function", "observation", "ipython")
_CALLS = "function_call"
_CALL_TAG = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT_TAG = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_TOOLS_TAG = re.compile(r"<tools>\s*(\[.*?\]|\{.*?\})\s*</tools>", re.DOTALL)
_PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def read_dialogue(task: str, row: Mapping[str, Any]) -> Dialogue | None:
    """The dialogue of a row; None for a plain conversation, without functions and thoughts of their own.

    Raises `RowError` with reason `null`, `unknown_role`, `turns`, `empty_answer`, `tools`, `call_breaks_schema` or
    `result_without_call`.
    """
    has_messages = bool(row.get("messages") or row.get("conversations"))
    if not has_messages and row.get("query") is not None and row.get("answers") is not None:
        turns = [DialogueTurn("user", str(row["query"]).strip()), _call_turn(task, row["answers"])]
        return make_dialogue(task, turns, read_tools(task, row.get("tools")))
    messages = [_without_nulls(message) for message in row.get("messages") or row.get("conversations") or ()]
    system = str(row.get("system") or "").strip()
    if not _has_functions(messages, row, system) and not any(message.get("reasoning_content") for message in messages):
        return None
    turns = [_turn(task, message) for message in messages]
    if turns and turns[0].role == "system":
        system, turns = turns[0].content or system, turns[1:]
    tools = read_tools(task, row.get("tools") if row.get("tools") is not None else row.get("functions"))
    if listed := _TOOLS_TAG.search(system):  # the text around them says how to call, which the chat template says itself
        tools, system = tools or read_tools(task, listed[1]), ""
    _check_results(task, turns)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    return make_dialogue(task, [DialogueTurn("system", system), *turns] if system else turns, tools)


def _has_functions(messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], system: str) -> bool:
    if row.get("tools") or row.get("functions") or _TOOLS_TAG.search(system):
        return True
    roles = {str(message.get("role") or message.get("from")).lower() for message in messages}
    if roles & {*_RESULTS, _CALLS} or any(message.get("tool_calls") or message.get(_CALLS) for message in messages):
        return True
    first = messages[0] if messages else {}
    return first.get("from") == "system" and _TOOLS_TAG.search(str(first.get("value"))) is not None


def _turn(task: str, message: Mapping[str, Any]) -> DialogueTurn:
    role_name = str(message.get("role") or message.get("from")).lower()
    content = _text(message.get("content") if message.get("content") is not None else message.get("value"))
    if role_name == _CALLS:
        return _call_turn(task, content)
    if role_name in _RESULTS:
        parts = _RESULT_TAG.findall(content)
        return DialogueTurn("tool", "\n".join(parts) if parts else content, name=str(message.get("name") or ""))
    role = ROLES.get(role_name)
    if role is None:
        raise RowError("unknown_role", f"task {task!r}: role {role_name!r} is none of {', '.join([*ROLES, _CALLS, *_RESULTS])}.")
    if role != "assistant":
        return DialogueTurn("system" if role == "system" else "user", content)
    calls = message.get("tool_calls") or ([message[_CALLS]] if message.get(_CALLS) else None)
    reasoning = message.get("reasoning_content")
    if calls is None and (tagged := _CALL_TAG.findall(content)):
        calls, content = tagged, _CALL_TAG.sub("", content).strip()
    return DialogueTurn("assistant", content, None if reasoning is None else str(reasoning).strip(), _calls(task, calls or ()))


def _call_turn(task: str, value: Any) -> DialogueTurn:
    return DialogueTurn("assistant", "", calls=_calls(task, value))


def _calls(task: str, value: Any) -> tuple[ToolCall, ...]:
    """Calls from a list, one call, or their JSON text. Raises `RowError`."""
    entries = _parsed(task, value)
    calls = []
    for entry in entries if isinstance(entries, list | tuple) else [entries]:
        call = _parsed(task, entry)
        call = _parsed(task, call["function"]) if isinstance(call, Mapping) and call.get("function") else call
        if not isinstance(call, Mapping) or not call.get("name"):
            raise RowError("call_breaks_schema", f"task {task!r}: a call has no function's name: {str(entry)[:80]!r}.")
        arguments = call.get("arguments", call.get("parameters"))
        values = _parsed(task, arguments) if isinstance(arguments, str) and arguments.strip() else (arguments or {})
        if not isinstance(values, Mapping):
            raise RowError("call_breaks_schema", f"task {task!r}: the arguments of a call of {call['name']!r} are no JSON object.")
        is_text = isinstance(arguments, str)  # nulls in it were meant
        kept = values if is_text else _without_nulls(values)
        calls.append(ToolCall(str(call["name"]), json.dumps(kept, ensure_ascii=False)))
    return tuple(calls)


def read_tools(task: str, value: Any) -> list[dict[str, Any]]:
    """The functions of a row in OpenAI's form. Raises `RowError` with reason `tools`."""
    entries = _without_nulls(_parsed(task, value)) if value else []
    tools = []
    for entry in entries if isinstance(entries, list) else [entries]:
        tool = _without_nulls(_parsed(task, entry))
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not function.get("name"):
            raise RowError("tools", f"task {task!r}: `tools` is no list of functions with names: {str(entry)[:80]!r}.")
        parameters = function.get("parameters") or {}
        parameters = _parsed(task, parameters)
        if isinstance(parameters, Mapping) and "properties" not in parameters and "type" not in parameters:
            parameters = _schema_of(parameters)
        elif isinstance(parameters, Mapping) and not isinstance(parameters.get("type", ""), str):
            parameters = _schema_of(parameters)  # an argument that is called `type`
        tools.append({"type": "function", "function": {**function, "parameters": parameters}})
    return tools


def _schema_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of xLAM's parameters: name → type as Python writes it, description and default."""
    properties, required = {}, []
    for name, about in parameters.items():
        facts = dict(about) if isinstance(about, Mapping) else {"type": str(about)}
        kind = str(facts.pop("type", ""))
        word = re.match(r"\w*", kind.strip().lower())
        known = _PYTHON_TYPES.get(word[0] if word else "", kind if kind in _PYTHON_TYPES.values() else None)
        properties[name] = ({"type": known} if known else {}) | facts
        if "optional" not in kind.lower() and "default" not in facts:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def worded_dialogue(task: str, question: Sequence[str], output: str, tools: Any) -> Dialogue:
    """The dialogue of one question, in parts, and the calls or words in `output`. Raises `RowError` as `make_dialogue` does."""
    calls = read_calls(output)
    answer = DialogueTurn("assistant", "" if calls else output, calls=calls)
    return make_dialogue(task, [DialogueTurn("user", "\n\n".join(filter(None, question))), answer], read_tools(task, tools))


def make_dialogue(task: str, turns: Sequence[DialogueTurn], tools: Sequence[Mapping[str, Any]]) -> Dialogue:
    """The dialogue of these turns, if they follow each other as they may and every call keeps to its schema.

    Raises `RowError` with reason `turns`, `empty_answer` or `call_breaks_schema`.
    """
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    before = ""
    for turn in turns:
        allowed = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool")}
        if turn.role not in allowed.get(before, ("tool", "assistant")):
            raise RowError("turns", f"task {task!r}: a turn of {turn.role!r} cannot follow one of {before or 'nobody'!r}.")
        if turn.role == "assistant" and not turn.content and not turn.calls:
            raise RowError("empty_answer", f"task {task!r}: an answer is empty.")
        for call in turn.calls:
            _check_call(task, call, schemas)
        before = turn.role
    if before != "assistant":
        raise RowError("turns", f"task {task!r}: the conversation has no turn of the assistant.")
    return Dialogue(tuple(turns), tuple(json.dumps(tool, ensure_ascii=False) for tool in tools))


def _check_results(task: str, turns: Sequence[DialogueTurn]) -> None:
    """Raises `RowError` for a result behind a turn that has fewer calls."""
    waiting = 0
    for turn in turns:
        waiting = waiting - 1 if turn.role == "tool" else len(turn.calls)
        if waiting < 0:
            raise RowError("result_without_call", f"task {task!r}: a result of a function stands where none was called.")


def _check_call(task: str, call: ToolCall, schemas: Mapping[str, Any]) -> None:
    if call.name not in schemas:
        raise RowError("call_breaks_schema", f"task {task!r}: {call.name!r} is called, which `tools` does not list.")
    if fault := fault_in(call.values, schemas[call.name]):
        raise RowError("call_breaks_schema", f"task {task!r}: a call of {call.name!r} breaks its own schema: {fault}.")


def _parsed(task: str, value: Any) -> Any:
    """`value` itself, or what it says if it is a text of JSON, or of Python as some datasets write it."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise RowError("tools", f"task {task!r}: {value[:80]!r} is no JSON.")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "\n".join(str(part["text"]) for part in content if part.get("text"))
    return "" if content is None else str(content).strip()
