"""Requests made up from the service's own OpenAPI description: none may be a server error, and the examples work."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings

import lexiseg
from lexiseg.app.service import create_app
from tests.app.test_service import SMALL


@pytest.fixture(scope="module")
def app() -> FastAPI:
    segmenter = lexiseg.load("zegclip-emoji", device="cpu", max_pixels=10_000)
    return create_app({"zegclip-emoji": segmenter}, SMALL.model_copy(update={"classes": "tree; sky"}))


def test_the_examples_work(app: FastAPI) -> None:
    client, tried = TestClient(app), []
    described = client.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        body = methods.get("post", {}).get("requestBody", {"content": {"application/json": {"schema": {}}}})
        schema = body["content"]["application/json"]["schema"]
        name = schema.get("$ref", "").rpartition("/")[2]
        for example in (described["components"]["schemas"][name] if name else schema).get("examples", []):
            reply = client.post(path, json=example)
            assert reply.status_code == 200, (path, reply.text)
            tried.append(path)
    assert set(tried) == {"/v1/segment", "/v1/batch", "/v1/classes", "/predict", "/cvat"}


@pytest.mark.parametrize("count", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_no_request_is_a_server_error(app: FastAPI, count: int) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    described = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/segment", "/v1/batch", "/v1/classes", "/predict"}
    for operation in operations:

        @settings(
            max_examples=count, deadline=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            reply = case.call()
            assert reply.status_code < 500, reply.text
            if reply.status_code >= 400:
                assert reply.json()["error"].endswith(".")

        ask()
