"""Errors of the HTTP interface, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

CLIENT_LEFT = 499  # nobody reads it; nginx uses the number in its logs
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_TEXTS = {404: "no such path: {method} {path}", 405: "{method} is not allowed for {path}"}


class APIError(Exception):
    """An answer with an HTTP status other than 200.

    Args:
        status: HTTP status.
        message: what is wrong and what to do.
        param: the field of the request that is wrong.
        code: a word for programs, such as `model_not_found`.
        headers: further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """The `type` of OpenAI's errors."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The JSON object of OpenAI's errors."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong_field(field: str, text: str) -> APIError:
    """The error for a field of a request that cannot be used; `text` says why."""
    return APIError(400, f"{field}: {text}", field)


# Beginning of a path -> the body of an error there. All others have OpenAI's.
BODIES: dict[str, Callable[[APIError], dict[str, Any]]] = {}


def error_response(error: APIError, path: str) -> Response:
    """The response for an error of a request to `path`."""
    body = next((make for start, make in BODIES.items() if path.startswith(start)), APIError.body)
    return JSONResponse(body(error), error.status, error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the application gets the shape of `APIError`."""

    @app.exception_handler(APIError)
    async def _(request: Request, error: APIError) -> Response:
        return error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return error_response(of_validation(error.errors(), error.body), request.url.path)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        text = _TEXTS.get(error.status_code, str(error.detail)).format(method=request.method, path=path)
        return error_response(APIError(error.status_code, text, headers=error.headers), path)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        message = f"internal error ({type(error).__name__}); the log of the server has the details"
        return error_response(APIError(500, message), request.url.path)


def of_validation(problems: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """The error for fields that do not have the documented form. It names the first one."""
    first = problems[0]
    param = _field(first, body)
    # A field that may have several forms has a problem for each of them.
    texts = dict.fromkeys(_text(one) for one in problems if _field(one, body) == param)
    return APIError(400, f"{param or 'body'}: {' or '.join(list(texts)[:3])}", param or None)


def _text(problem: Mapping[str, Any]) -> str:
    if problem["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return "must be a JSON object"
    text = str(problem["msg"])
    return text[:1].lower() + text[1:] if problem["type"] != "value_error" else text.removeprefix("Value error, ")


def _field(problem: Mapping[str, Any], body: Any) -> str:
    """The place of a problem, as `messages[0].content`. Parts that name one of several forms are left out."""
    place, value = "", body
    _, *parts = problem["loc"]
    if "field" in problem.get("ctx", {}):
        parts = [*parts, problem["ctx"]["field"]]
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            place, value = f"{place}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (last and problem["type"] == "missing")):
            place, value = f"{place}.{part}" if place else str(part), value.get(part)
        elif problem["loc"][0] != "body":  # of the path or the query
            place = str(part)
    return place
