"""The error body, in OpenAI's shape, and the refusal of a request whose fields are not valid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from apprentice.errors import did_you_mean
from apprentice.serve.api.schemas.responses import ResponseBody


class ErrorFields(ResponseBody):
    """What went wrong, OpenAI's word for its kind, the field that it is about, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseBody):
    """Body of every error, in OpenAI's shape."""

    error: ErrorFields


class RequestProblem(Exception):  # noqa: N818 - a fault of the request, sent to the client
    """A refusal of a request: HTTP `status` and error `body` in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = ErrorBody(error=ErrorFields(message=message, type=kind, param=param, code=code))


# Type names that pydantic puts between keys where a value may have several types. Keys named `functions` or `list` do not match.
_TYPE_NAME = re.compile(r"(list\[|constrained-|function-\w+\[|str$|json-or)")


def problem_of_fields(errors: Sequence[Any], known: Sequence[str]) -> RequestProblem:
    """Refusal with the most telling of pydantic's `errors` about a request's body; `known` are the body's fields."""
    # Where a value may have several types there is an error for each; the deepest says most.
    deepest = max(errors, key=lambda error: len(error["loc"]) if error["loc"][:2] == errors[0]["loc"][:2] else 0)
    names = [str(part) for part in deepest["loc"] if part != "body"]
    is_unknown = deepest["type"] == "extra_forbidden"  # then the last part is a key, whatever it looks like
    path = [name for place, name in enumerate(names) if (is_unknown and place == len(names) - 1) or not _TYPE_NAME.match(name)]
    param = ".".join(path) or None
    if deepest["type"] == "json_invalid":
        return RequestProblem(f"the body is not JSON: {deepest['ctx']['error']}.")
    if is_unknown and len(path) == 1:
        hint = did_you_mean(path[0], known)
        return RequestProblem(
            f"`{path[0]}` is not supported here.{hint} Supported: {', '.join(known)}.", param=param, code="unsupported_parameter"
        )
    message = str(deepest["msg"]).removeprefix("Value error, ")
    return RequestProblem(f"`{param}`: {message}." if param else f"the body: {message}.", param=param, code=deepest["type"])
