"""The answer to one request while it comes in: its choices, and the events they become."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from axicon.generate.request import Delta
from services.errors import ApiError
from services.plan import Plan
from services.render import DONE, Choice, Usage

log = logging.getLogger("axicon")


class Answer:
    """Collects the deltas of one request, for one body at the end or for events on the way."""

    def __init__(self, plan: Plan) -> None:
        self.form = plan.form
        self._index = {request.id: index for index, request in enumerate(plan.requests)}
        self._choices = [Choice(index) for index in range(len(plan.requests))]
        self._per_prompt = len(plan.requests) // plan.prompts
        self._guesses = any(request.params.speculation is not None for request in plan.requests)
        self._opened: set[int] = set()
        self.trouble: ApiError | None = None
        """Why the events end early, once they do."""

    def add(self, delta: Delta) -> None:
        """Take one delta. Raises ApiError when it says that the request failed."""
        check(delta)
        self._choices[self._index[delta.request_id]].add(delta)

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """Take deltas and give them back as events; one that only holds back a part of a character is none.
        Stops at a delta that says that the request failed: `trouble` holds what it says. Raises it when
        nothing came before."""
        text = ""
        for delta in deltas:
            try:
                check(delta)
            except ApiError as trouble:
                self.trouble = trouble
                if not text:
                    raise
                break
            index = self._index[delta.request_id]
            if index not in self._opened:
                self._opened.add(index)
                text += self.form.opening(index)
            scores = delta.logprobs or delta.prompt_logprobs
            if delta.text or scores or delta.origins or delta.finish_reason:
                text += self.form.event(index, delta)
            choice = self._choices[index]
            choice.count(delta)
        return text.encode()

    def closing(self) -> bytes:
        """What ends the events of a request that went well."""
        return self.form.closing(self.usage).encode() + DONE

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        return self.form.body(self._choices, self.usage)

    @property
    def usage(self) -> Usage:
        return Usage(
            sum(choice.prompt_tokens for choice in self._choices[:: self._per_prompt]),
            sum(choice.completion_tokens for choice in self._choices),
            sum(choice.cached for choice in self._choices[:: self._per_prompt]),
            sum(choice.accepted for choice in self._choices) if self._guesses else None,
            sum(choice.rejected for choice in self._choices),
        )


def check(delta: Delta) -> None:
    """Raises ApiError for a delta that says its request failed."""
    if delta.finish_reason == "deadline":
        # Trying again would only take as long again.
        raise ApiError(
            408,
            "The request took longer than this server allows.",
            code="deadline_exceeded",
            headers={"X-Should-Retry": "false"},
        )
    if delta.finish_reason == "error":
        log.warning("request %s failed: %s", delta.request_id, delta.error)
        raise ApiError(500, "The engine failed on this request; its log has the reason.", code="engine_error")
    if delta.finish_reason == "cancelled":
        raise ApiError(503, "The server is shutting down.", code="shutting_down")
