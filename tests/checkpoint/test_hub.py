"""resolve_file: local folders, hub ids through a cache laid out by hand, and no network at all."""

from pathlib import Path
from typing import ClassVar

import pytest

from fastbert.checkpoint.hub import resolve_file

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")


@pytest.fixture
def hub(monkeypatch):
    """Stand-in for hf_hub_download: `.outcome` is a path or an exception, `.calls` what was asked."""

    class Hub:
        outcome: object = None
        calls: ClassVar[list] = []

        def __call__(self, repo_id, filename, *, revision=None):
            self.calls.append((repo_id, filename, revision))
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return self.outcome

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


def test_file_in_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_file(tmp_path, "config.json") == tmp_path / "config.json"
    assert resolve_file(str(tmp_path) + "/", "config.json") == tmp_path / "config.json"


def test_missing_file_in_a_folder(tmp_path):
    assert resolve_file(tmp_path, "vocab.txt", required=False) is None
    with pytest.raises(FileNotFoundError) as info:
        resolve_file(tmp_path, "vocab.txt")
    assert "vocab.txt" in str(info.value) and str(tmp_path) in str(info.value)


def test_a_folder_entry_is_not_a_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert resolve_file(tmp_path, "config.json", required=False) is None


def test_path_is_a_file(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match=r"config\.json"):
        resolve_file(tmp_path / "model", "config.json")


@pytest.mark.parametrize("name", ["./nope", "/nope/model", "a/b/c", "org/name/", "../x", "~/nope", "a b", "", "a\\b"])
def test_missing_folder_never_asks_the_hub(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if name == "":  # the empty path is the current folder
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            resolve_file(name, "config.json")
    else:
        with pytest.raises(FileNotFoundError, match="no folder"):
            resolve_file(name, "config.json", required=False)
    assert hub.calls == []


def test_a_path_object_is_always_local(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        resolve_file(Path("org/name"), "config.json")
    assert hub.calls == []


@pytest.mark.parametrize("bad", [None, 3, b"org/name"])
def test_wrong_type(bad):
    with pytest.raises(TypeError, match="path_or_id"):
        resolve_file(bad, "config.json")


def test_hub_download(hub, tmp_path):
    hub.outcome = str(tmp_path / "config.json")
    assert resolve_file("org/name", "config.json", revision="v2") == tmp_path / "config.json"
    assert resolve_file("name", "config.json") == tmp_path / "config.json"
    assert hub.calls == [("org/name", "config.json", "v2"), ("name", "config.json", None)]


def test_hub_has_no_such_file(hub):
    hub.outcome = errors.EntryNotFoundError("404")
    assert resolve_file("org/name", "vocab.txt", required=False) is None
    with pytest.raises(FileNotFoundError, match=r"org/name.*vocab\.txt"):
        resolve_file("org/name", "vocab.txt")


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "failure",
    [
        errors.LocalEntryNotFoundError("no connection\nsecond line"),
        ConnectionError("no route"),
        TimeoutError(),
    ],
)
def test_network_failure_is_never_taken_for_a_missing_file(hub, failure, required):
    hub.outcome = failure
    with pytest.raises(OSError) as info:
        resolve_file("org/name", "config.json", required=required)
    message = str(info.value)
    assert "org/name" in message and "config.json" in message and "\n" not in message
    assert "not found locally as a folder either" in message


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.outcome = errors.LocalEntryNotFoundError("offline")
    assert resolve_file("org/name", "config.json", required=False) is None
    with pytest.raises(OSError, match="offline mode is on"):
        resolve_file("org/name", "config.json")


def test_file_known_to_be_absent_needs_no_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: huggingface_hub._CACHED_NO_EXIST)
    hub.outcome = errors.LocalEntryNotFoundError("no connection")
    assert resolve_file("org/name", "added_tokens.json", required=False) is None
