"""Changes to the files of a checkpoint, drawn at random: bytes, values of JSON, headers, archives, links."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

DEEP = "\0deep\0"  # stands for 100,000 lists within each other, which json cannot write
VALUES = [
    None, True, False, "", "0", "3", "0.1", "gelu", "[PAD]", "../x", "x" * 1000, "中文", "\ud800", "\0", " ",
    -1, 0, 1, 2, 3, 7, 10**6, 10**8, 2**31, 2**63, 10**18, 10**400, -(10**18), 0.5, 1.0, -0.1, 1e30, 1e308,
    float("nan"), float("inf"), float("-inf"), [], [1], ["a", "b"], [[]], {}, {"a": 1}, {"0": "a"}, {"content": 3},
    DEEP,
]  # fmt: skip
OUTSIDE = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", "\\x", "config.json", "x" * 300]


def mutate(file: Path, rng: random.Random) -> str:
    """Replaces `file` by a changed one, and returns in words how."""
    content = file.read_bytes()
    ways = [_bytes, _bytes, _links]
    if file.suffix == ".json":
        ways += [_json] * 9 + ([_outside] * 2 if "index" in file.name or file.name == "modules.json" else [])
    elif file.suffix == ".safetensors":
        ways += [_header] * 5
    elif file.suffix == ".bin":
        ways += [_archive] * 4 + [_state] * 2 if content[:2] == b"PK" else [_bytes, _state]
    elif file.suffix == ".txt":
        ways += [_lines] * 5
    way = rng.choice(ways)
    file.unlink()
    return f"{way.__name__[1:]}: {way(file, content, rng)}"


def _bytes(file: Path, content: bytes, rng: random.Random) -> str:
    size = len(content)
    at, more = rng.randrange(size), rng.randrange(1, 200)
    # Half of what is changed lies where the structure is: at the ends.
    at = rng.choice((at, min(at % 400, size - 1), max(0, size - 1 - at % 800)))
    what = rng.choice(
        ("bit", "byte", "few", "cut", "append", "drop", "repeat", "empty", "random", "zeros", "BOM", "16")
    )
    changed = bytearray(content)
    if what == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    elif what == "byte":
        changed[at] = rng.randrange(256)
    elif what == "few":
        for _ in range(8):
            changed[rng.randrange(max(0, at - 50), min(size, at + 50))] = rng.randrange(256)
    elif what == "cut":
        del changed[at:]
    elif what == "append":
        changed += rng.choice((b"\0" * more, rng.randbytes(more), content))
    elif what == "drop":
        del changed[at : at + more]
    elif what == "repeat":
        changed[at:at] = changed[at : at + more]
    elif what == "empty":
        changed = b""
    elif what == "random":
        changed = rng.randbytes(size)
    elif what == "zeros":
        changed[at : at + more] = bytes(len(changed[at : at + more]))
    elif what == "BOM":
        changed = b"\xef\xbb\xbf" + content
    else:
        changed = content.decode("latin-1").encode("utf-16")
    file.write_bytes(changed)
    return f"{what} at {at} of {size}"


def _links(file: Path, content: bytes, rng: random.Random) -> str:
    what = rng.choice(("none", "folder", "loop", "outside", "other", "device"))
    outside = file.parent.parent / "outside"
    if what == "folder":
        file.mkdir()
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "outside":
        outside.write_bytes(content)
        file.symlink_to(outside)
    elif what == "other":
        others = sorted(p for p in file.parent.iterdir() if p.is_file())
        os.link(rng.choice(others), file) if others else file.write_bytes(b"{}")
    elif what == "device":
        file.symlink_to("/dev/zero")
    return what


def _json(file: Path, content: bytes, rng: random.Random) -> str:
    value, what = _changed(json.loads(content), rng)
    file.write_bytes(_dump(value))
    return what


def _changed(value: Any, rng: random.Random) -> tuple[Any, str]:
    """`value` with one of its parts changed."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        new = rng.choice(VALUES)
        return new, f"all of it is {str(new)[:40]!r}"
    shallow = [place for place in places if len(place[1]) == 1]
    holder, path = rng.choice(shallow if rng.random() < 0.6 else places)
    key = path[-1]
    what = rng.choice(("replace",) * 7 + ("delete", "rename", "twice", "swap", "as text", "scale"))
    if what == "delete":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[rng.choice(("", "x", "0", "-1", key.upper(), key + " "))] = holder.pop(key)
    elif what == "twice" and isinstance(holder, dict):
        holder[_Twin(key)] = rng.choice(VALUES[:-1])
    elif what == "swap":
        other, other_path = rng.choice(places)
        if other_path[: len(path)] != path and path[: len(other_path)] != other_path:
            holder[key], other[other_path[-1]] = other[other_path[-1]], holder[key]
    elif what == "as text":
        holder[key] = json.dumps(holder[key])
    elif what == "scale" and isinstance(holder[key], int | float):
        holder[key] *= rng.choice((-1, 2, 10, 10**6, 10**12, 0.5))
    else:
        holder[key] = new = rng.choice(VALUES)
        what = f"replaced by {str(new)[:40]!r}"
    return value, f"{'.'.join(map(str, path))[:60]!r} {what}"


class _Twin(str):
    """A key that a dict takes next to the same one."""

    def __hash__(self) -> int:
        return 1 + super().__hash__()

    def __eq__(self, other: object) -> bool:
        return self is other


def _places(value: Any, path: tuple = ()) -> Any:
    """Each part of a JSON value: what holds it, and the way there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, (*path, key)
        yield from _places(inner, (*path, key))


def _dump(value: Any) -> bytes:
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode()


def _outside(file: Path, content: bytes, rng: random.Random) -> str:
    value, name = json.loads(content), rng.choice(OUTSIDE)
    if isinstance(value, list):
        rng.choice(value)["path"] = name
        file.write_bytes(_dump(value))
        return f"path {name!r}"
    key = rng.choice(sorted(value["weight_map"]))
    linked = rng.random() < 0.5
    if linked:  # the shard itself leads out
        shard = file.parent / value["weight_map"][key]
        (file.parent.parent / "outside").write_bytes(shard.read_bytes())
        shard.unlink()
        shard.symlink_to(file.parent.parent / "outside")
    else:
        value["weight_map"][key] = name
    file.write_bytes(_dump(value))
    return "a shard is a link that leads out" if linked else f"{key} in {name!r}"


def _header(file: Path, content: bytes, rng: random.Random) -> str:
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    what = rng.choice(("value", "value", "value", "offsets", "body", "length", "name", "dtype"))
    names = sorted(name for name in header if name != "__metadata__")
    name, other = rng.choice(names), rng.choice(names)
    detail = name
    if what == "value":
        header, detail = _changed(header, rng)
    elif what == "offsets":
        header[name]["data_offsets"] = rng.choice(
            (header[other]["data_offsets"], [n + 4 for n in header[name]["data_offsets"]], [0, 2**63], [8, 0], [-4, 0])
        )
    elif what == "body":
        body = rng.choice((body[:-4], body + b"\0" * 8, b"", body[4:]))
    elif what == "name":
        new = rng.choice((other, name.removeprefix("bert."), "bert." + name, "", "\ud800", "x" * 5000))
        header[_Twin(new)] = header.pop(name)
        detail = f"{name} is {new[:50]!r}"
    elif what == "dtype":
        header[name]["dtype"] = rng.choice(("F16", "I32", "U32", "F64", "BOOL", "F8_E4M3", "X", "f32"))
    text = _dump(header)
    size = rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1)) if what == "length" else len(text)
    file.write_bytes(size.to_bytes(8, "little") + text + body)
    return f"{what} {detail}"


def _archive(file: Path, content: bytes, rng: random.Random) -> str:
    what = rng.choice(
        ("deflate", "lzma", "short", "long", "empty", "missing", "twice", "pickle", "order", "swap", "bomb")
    )
    source = zipfile.ZipFile(io.BytesIO(content))
    records = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    data = [i for i, (name, _) in enumerate(records) if "/data/" in name]
    at, other = rng.choice(data), rng.choice(data)
    name, record = records[at]
    if what in ("short", "long", "empty"):
        records[at] = name, {"short": record[: len(record) // 2], "long": record + record, "empty": b""}[what]
    elif what == "missing":
        del records[rng.randrange(len(records))]
    elif what == "twice":
        records.append((name, rng.randbytes(len(record))))
    elif what == "pickle":
        i = next(i for i, (n, _) in enumerate(records) if n.endswith("data.pkl"))
        changed = bytearray(records[i][1])
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        records[i] = records[i][0], bytes(changed)
    elif what == "order":
        records = [(n, b"big" if n.endswith("byteorder") else r) for n, r in records]
    elif what == "swap":
        records[at], records[other] = (name, records[other][1]), (records[other][0], record)
    elif what == "bomb":
        records.append((name.rpartition("/")[0] + "/spare", bytes(64 << 20)))
    method = {"deflate": zipfile.ZIP_DEFLATED, "bomb": zipfile.ZIP_DEFLATED, "lzma": zipfile.ZIP_LZMA}
    chosen = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method.get(what, chosen), compresslevel=1) as target:
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, record in records:
            target.writestr(name, record)
    return f"{what} {name}"


class _Runs:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def _state(file: Path, content: bytes, rng: random.Random) -> str:
    """Other contents in a sound file of torch's."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    name = rng.choice(sorted(state))
    tensor = state[name]
    what = rng.choice(("view", "half", "double", "int", "complex", "sparse", "meta", "code", "kinds", "nested", "list",
                       "wide", "prefix", "legacy", "plain pickle", "deep"))  # fmt: skip
    changes = {
        "view": lambda: torch.stack([tensor, tensor], -1)[..., 1],
        "half": tensor.half,
        "double": tensor.double,
        "int": tensor.int,
        "complex": lambda: torch.complex(tensor, tensor),
        "sparse": tensor.to_sparse,
        "meta": lambda: tensor.to("meta"),
        "code": _Runs,
        "wide": lambda: tensor[:1].expand(10**9, *tensor.shape[1:]),
    }
    if what in changes:
        state[name] = changes[what]()
    elif what == "kinds":
        state |= {"a": 1, "b": [tensor], "c": {"d": tensor}, 3: tensor, "e": None}
    elif what == "nested":
        state = {"state_dict": rng.choice((state, state, None, [], 3)), "epoch": 3}
    elif what == "list":
        state = rng.choice((list(state.values()), tensor, 3, {}, {3: tensor}))
    elif what == "prefix":
        state[name.removeprefix("bert.") if name.startswith("bert.") else f"bert.{name}"] = tensor.clone()
    elif what == "deep":
        for _ in range(300):
            state = [state]
    zipped = rng.random() < 0.6
    if what == "plain pickle":
        file.write_bytes(pickle.dumps({"a": [1, 2]}))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return f"{what} {name}"


def _lines(file: Path, content: bytes, rng: random.Random) -> str:
    lines = content.split(b"\n")[:-1]
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.choice(("delete", "repeat", "swap", "blank", "latin", "NUL", "long", "CRLF", "many", "end"))
    if what == "delete":
        del lines[at]
    elif what == "repeat":
        lines[at] = lines[other]
    elif what == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif what == "blank":
        lines[at] = b"  "
    elif what == "latin":
        lines[at] = b"caf\xe9"
    elif what == "NUL":
        lines[at] += b"\0"
    elif what == "long":
        lines[at] = b"x" * 1_000_000
    elif what == "CRLF":
        lines = [line + b"\r" for line in lines]
    elif what == "many":
        lines += [b"t%d" % i for i in range(50_000)]
    file.write_bytes(b"\n".join(lines) + (b"" if what == "end" else b"\n"))
    return f"{what}, line {at}"
