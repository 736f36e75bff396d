"""A server's app with three small models, in this process."""

import time
from dataclasses import fields

import pytest
import torch
from starlette.testclient import TestClient
from support import require_native
from tasks_support import labels, save
from tiny_bert import save_tiny

from fastbert.serve.app import make_app
from fastbert.serve.settings import ServeSettings

SETTINGS = {field.name for field in fields(ServeSettings)}


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Folders of an embedder, a classifier, a tagger and a reranker, by their names."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    return {
        "vectors": str(save_tiny(folder / "vectors")),
        "classes": save(folder / "classes", "bert", "ForSequenceClassification", **labels("bad", "good", "neither")),
        "tags": save(folder / "tags", "bert", "ForTokenClassification", **labels("O", "B-PER", "I-PER")),
        "ranks": save(folder / "ranks", "bert", "ForSequenceClassification", num_labels=1),
        "answers": save(folder / "answers", "bert", "ForQuestionAnswering"),
    }


@pytest.fixture
def start_paths():
    """Starts an app for models, by their paths or as name=path, with these settings; returns its client."""
    require_native()
    opened = []

    def run(*paths, **given):
        settings = {name: given.pop(name) for name in SETTINGS & given.keys()}
        models = (*paths, *(f"{name}={path}" for name, path in given.items()))
        client = TestClient(make_app(ServeSettings(models=models, **settings)), raise_server_exceptions=False)
        opened.append(client)
        client.__enter__()
        while client.get("/ready").status_code != 200:
            assert client.app.state.serve.failed is None, client.app.state.serve.failed
            time.sleep(0.01)
        return client

    yield run
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def start(served, start_paths):
    """Starts an app for some of `served`, by default all, with these settings; returns its client."""

    def run(*names, **settings):
        return start_paths(**{name: served[name] for name in names or served}, **settings)

    return run
