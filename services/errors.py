"""Refusals, in the shape the OpenAI clients read.

Every body that is not a success is `{"error": {"message", "type", "param", "code"}}`; the client libraries
choose their exception by the status code. Overload is 429 and never 502, 503 or 504: proxies in front rewrite
or retry those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from axicon.generate.request import Overloaded, RequestError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dump(value: object) -> bytes:
    """JSON of `value`. A lone surrogate, which no client may send but an error message may quote, becomes
    `?`."""
    return encode(value).encode("utf-8", "replace")


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump(content)


class ApiError(Exception):
    """One refused or failed request. `param` names the field that is to blame, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        return Json(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as asked."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: Exception) -> ApiError:
    """The HTTP form of what the engine raises; anything unforeseen is a 500 that says nothing about the
    inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return bad_request(str(error), error.param)
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(429, str(error), code="overloaded", headers=headers)
    return ApiError(500, "The server failed on this request; its log has the reason.", code="internal_error")
