"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A response with an error.

    Args:
        status: of HTTP. param: the name of the parameter at fault. code: OpenAI's, for programs to compare.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
