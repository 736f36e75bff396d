"""The description of the routes as OpenAPI, and as a page that needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from fastbert.serve.routes import Api

_REFERENCE = "#/components/schemas/{model}"
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{background:#f4f4f4;padding:1em}"
)


def document(apis: Sequence[Api], version: str) -> dict[str, Any]:
    """The OpenAPI document of routes."""
    schemas = {api.schema for api in apis if api.schema is not None}
    ordered = sorted(schemas, key=lambda schema: schema.__name__)
    references, components = models_json_schema([(one, "validation") for one in ordered], ref_template=_REFERENCE)
    paths: dict[str, Any] = {}
    for api in apis:
        name = api.path.strip("/").replace("/", "_") or "root"
        summary = (api.handler.__doc__ or name.replace("_", " ")).strip().split("\n")[0]
        described: dict[str, Any] = {
            "tags": [api.tag],
            "operationId": name,
            "summary": summary,
            "responses": {"200": {"description": "The answer"}},
        }
        if api.schema is not None:
            content = {"application/json": {"schema": references[api.schema, "validation"]}}
            described["requestBody"] = {"required": True, "content": content}
            wrong = {"413": "too long", "422": "wrong", "429": "too many", "424": "the model failed"}
            described["responses"] |= {code: {"description": text} for code, text in wrong.items()}
        paths.setdefault(api.path, {})[api.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastbert", "version": version},
        "paths": paths,
        "components": {"schemas": components.get("$defs", {})},
    }


def page(described: dict[str, Any]) -> str:
    """The document as HTML."""
    parts = [f"<!doctype html><meta charset=utf-8><title>fastbert</title><style>{_STYLE}</style><h1>fastbert</h1>"]
    parts.append("<p>The same as JSON: <a href=openapi.json>openapi.json</a></p>")
    schemas = described["components"]["schemas"]
    for path, methods in described["paths"].items():
        for method, one in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(one['tags'][0])}</p>"
            )
            if "requestBody" in one:
                name = one["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                text = json.dumps(schemas[name], indent=2)
                parts.append(f"<details><summary>body</summary><pre>{html.escape(text)}</pre></details>")
    return "".join(parts)
