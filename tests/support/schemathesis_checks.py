"""What Schemathesis checks besides its own: an error has a code that the description names for it."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.check
def problem_has_a_documented_code(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    if response.status_code < 400:
        return
    code = response.json()["code"]
    described = case.operation.definition.raw["responses"].get(str(response.status_code))
    # Another method than those that are described is refused by all endpoints alike.
    if described is None and response.status_code == 405:
        return
    named = described["content"]["application/problem+json"]["examples"] if described else {}
    assert code in named, f"{response.status_code} {code} is not among {sorted(named)}"
