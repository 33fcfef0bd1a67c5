"""The server against requests that schemathesis makes of its own OpenAPI description.

It takes a minute and the package schemathesis, so it is run by `.ci/frameworks serve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from qzoom_agent.agent import Agent
from qzoom_agent.models.scripted import ScriptedBackend
from tests.tools.support import needs

pytestmark = pytest.mark.slow
schemathesis = needs("schemathesis", "serve")
needs("fastapi", "serve")
RIGHT = {200, 400, 401, 404, 405, 413, 429}
"""Statuses that a request may be answered with; never one of 5xx."""


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    from tests.integrations.test_serve import running

    with running(Agent(ScriptedBackend(lambda messages: "42", protocol="plain"), policy="direct")) as found:
        yield found


def test_any_request_gets_an_answer_of_the_description(client: httpx.Client) -> None:
    description = schemathesis.openapi.from_url(str(client.base_url.join("/openapi.json")))
    operations = [one.ok() for one in description.get_all_operations()]
    assert {one.path for one in operations} >= {"/v1/chat/completions", "/health", "/metrics", "/traces/{trace_id}"}
    for operation in operations:

        @settings(max_examples=30, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call()
            assert response.status_code in RIGHT, response.text[:500]
            # a request of the right form may still be one that cannot be answered, such as one without an image
            case.validate_response(response, excluded_checks=[schemathesis.checks.positive_data_acceptance])

        ask()
