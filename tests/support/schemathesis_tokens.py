"""What Schemathesis checks on a server with tokens: who gets an answer, and about which datasets."""

from __future__ import annotations

from typing import Any

import schemathesis

OPEN = ("/healthz", "/readyz", "/v1/local/proof")
IN_SCOPE = "mixed"
OUT_OF_SCOPE = ("tall", "sub.small", "broken", "odd")
"""Datasets of the data folder that most tests share."""

_REFUSED = (400, 404, 405, 406, 431)
"""What may be wrong before it is asked which dataset is meant, or where it is none."""


@schemathesis.check
def strangers_get_401(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    if case.operation.path in OPEN:
        assert response.status_code < 500 or response.headers.get("retry-after"), response.text
        return
    # What is too long for a head, or none, is refused before anybody looks at a token.
    code = response.json()["code"]
    assert (response.status_code, code) in ((401, "unauthorized"), (431, "too_large"), (400, "bad_parameter"))
    if response.status_code == 400:
        assert "not a valid HTTP request" in response.json()["detail"], response.text


@schemathesis.check
def members_see_their_datasets_alone(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    if response.status_code >= 500:
        code = response.json()["code"]
        assert code == "dataset_corrupt" or (response.status_code == 503 and response.headers.get("retry-after")), code
    name = (case.path_parameters or {}).get("name")
    if name in OUT_OF_SCOPE:
        assert response.status_code in _REFUSED, f"{response.status_code} for {name!r}"
        problem = response.json()
        # As for one that does not exist: which there are is not told.
        assert problem["code"] != "dataset_not_found" or f"choose from {IN_SCOPE}" in problem["detail"], problem
    elif name is None and case.operation.path == "/v1/datasets" and response.status_code == 200:
        listed = [one["name"] for one in response.json()["datasets"]]
        assert set(listed) <= {IN_SCOPE}, listed
