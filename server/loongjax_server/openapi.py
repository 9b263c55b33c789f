"""The OpenAPI document: bodies are parsed by hand, off the event loop, so their schemas are added by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loongjax_server.service_level import describe_headers

_REF_TEMPLATE = "#/components/schemas/{model}"


def json_body(body_type: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this body."""
    schema = {"$ref": _REF_TEMPLATE.format(model=body_type.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def generation_request(body_type: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that generates: this body, and the headers that say how soon."""
    return {**json_body(body_type), "parameters": describe_headers()}


def describe_bodies(app: FastAPI, body_types: tuple[type[BaseModel], ...]) -> None:
    """Makes the application's document define the bodies that its routes refer to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema(
                [(body_type, "validation") for body_type in body_types], ref_template=_REF_TEMPLATE
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # pyright: ignore[reportAttributeAccessIssue]
