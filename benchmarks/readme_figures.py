"""Fills the tables of README.md and docs/ and draws the README's picture, from rows of results/ and nothing else.

    python benchmarks/readme_figures.py            # with the newest rows
    python benchmarks/readme_figures.py --check    # status 1 where a file is not what the rows that it names give

A table stands between `<!-- rows NAME DATE... -->` and `<!-- end of rows -->`, and a date names the rows of one
interleaved run. So a new run changes no table until this script is run again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pictures" / "packing.svg"
PAGES = ("README.md", "docs/performance.md")
BLOCK = re.compile(r"<!-- rows (?P<name>\S+)(?P<dates>(?: \S+)*) -->\n.*?<!-- end of rows -->", re.S)

Row = dict[str, str]
NAMES = {
    "transformers-eager": "transformers, eager, padded to the longest",
    "transformers-sdpa": "transformers, sdpa, padded to the longest",
    "transformers-sdpa-sorted": "transformers, sdpa, sorted by length",
    "torch-compile": "torch.compile, frozen, padded",
    "torch-compile-sorted": "torch.compile, frozen, sorted",
    "onnxruntime": "ONNX Runtime, padded",
    "onnxruntime-sorted": "ONNX Runtime, sorted",
    "openvino": "OpenVINO, padded",
    "openvino-sorted": "OpenVINO, sorted",
    "ctranslate2": "CTranslate2, padded",
    "ctranslate2-sorted": "CTranslate2, sorted",
    "fastbert-reference": "fastbert's reference: packing alone, in plain PyTorch",
    "fastbert-accelerate": "`fastbert.accelerate(model)`",
    "fastbert": "**fastbert**",
    "fastbert-recompute": "fastbert, `recompute_activations`",
}
DTYPES = ("fp32", "bf16", "int8")


class Source(NamedTuple):
    """Rows of one CSV file: those of the newest date, or of a named one, whose columns have these values."""

    file: str
    columns: dict[str, str]

    def rows(self, date: str | None = None) -> list[Row]:
        matching = [r for r in read_rows(RESULTS / self.file) if all(r[k] == v for k, v in self.columns.items())]
        date = date or max((r["date"] for r in matching), default="")
        found = [r for r in matching if r["date"] == date]
        if not found:
            raise LookupError(f"{self.file} has no row of {self.columns} with the date {date or '(any)'}")
        return found


def is_peer(row: Row) -> bool:
    return not row["provider"].startswith("fastbert")


def by_provider(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """provider -> dtype -> row, of rows with a figure; in the order of first appearance."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(row["provider"], {})[row["dtype"]] = row
    return found


def strongest(rows: Sequence[Row], dtype: str) -> Row:
    """The fastest row of another library in this precision."""
    return min(
        (r for r in rows if r["status"] == "ok" and r["dtype"] == dtype and is_peer(r)),
        key=lambda r: float(r["p50_ms"]),
    )


def speed(row: Row, figure: str = "p50_ms") -> float:
    """Real tokens per second."""
    return float(row["tokens"]) / float(row[figure]) * 1e3


def times(row: Row, other: Row) -> str:
    ratio = float(other["p50_ms"]) / float(row["p50_ms"])
    return f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def with_spread(row: Row | None, bold: bool = False) -> str:
    """The median, and the range from the slower to the faster of the p80 and p20 calls."""
    if row is None:
        return ""
    median = f"{speed(row):,.0f}"
    return f"{f'**{median}**' if bold else median} ({speed(row, 'p80_ms'):,.0f}–{speed(row, 'p20_ms'):,.0f})"


def ms(row: Row, figure: str = "p50_ms") -> str:
    value = float(row[figure])
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def name_of(row: Row) -> str:
    """The library's name alone."""
    return NAMES.get(row["provider"], row["provider"]).split(",")[0]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(re.sub(r" +", " ", "| " + " | ".join(line) + " |") for line in lines)


def texts_table(groups: list[list[Row]]) -> str:
    """fastbert against the sorted baseline and the strongest other library, real tokens/s."""
    texts, unpadded = groups
    baseline = by_provider(texts)["transformers-sdpa-sorted"]
    head = ["real tokens per second", *DTYPES]
    lines = [
        ["transformers, sorted by length", *(with_spread(baseline.get(d)) for d in DTYPES)],
        *against_strongest(texts),
    ]
    ratios = (times(ours, baseline[d]) if d in baseline else "" for d, ours in own(texts))
    lines.insert(3, ["over transformers, sorted", *ratios])
    without = [[name.replace("**fastbert**", "fastbert"), *cells] for name, *cells in against_strongest(unpadded)]
    return table(head, [*lines, ["*without padding: 8 texts of 128 tokens*", "", "", ""], *without])


def own(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(dtype, by_provider(rows)["fastbert"][dtype]) for dtype in DTYPES]


def against_strongest(rows: Sequence[Row]) -> list[list[str]]:
    """Three lines: the strongest other library of each precision, fastbert, and how they compare."""
    best = {dtype: strongest(rows, dtype) for dtype in DTYPES}
    names = " / ".join(dict.fromkeys(NAMES[row["provider"]].removesuffix(", padded") for row in best.values()))
    return [
        [f"the best other runtime: {names}", *(with_spread(best[d]) for d in DTYPES)],
        ["**fastbert**", *(with_spread(row, bold=True) for _, row in own(rows))],
        ["over the best other runtime", *(times(row, best[d]) for d, row in own(rows))],
    ]


def providers_table(groups: list[list[Row]]) -> str:
    """Each library, real tokens/s."""
    lines = [
        [NAMES[name], *(with_spread(found.get(d), name == "fastbert") for d in DTYPES)]
        for name, found in by_provider(groups[0]).items()
        if set(found) & set(DTYPES)
    ]
    return table(["real tokens per second", *DTYPES], lines)


def shapes_table(groups: list[list[Row]]) -> str:
    """fastbert against the strongest other library by shape, ms a call."""
    lines = []
    for rows in groups:
        for dtype in DTYPES:
            ours = by_provider(rows).get("fastbert", {}).get(dtype)
            if ours is None:
                continue
            best = strongest(rows, dtype)
            figures = [f"{ms(r)} ({ms(r, 'p20_ms')}–{ms(r, 'p80_ms')})" for r in (best, ours)]
            case = f"{ours['model']} {ours['shape'].replace('x', ' x ')}"
            share = f"{float(ours['ceiling_share']):.0%}"
            lines.append([case, dtype, name_of(best), *figures, times(ours, best), share])
    return table(["model, batch x tokens", "", "strongest peer", "ms", "fastbert, ms", "", "of the peak"], lines)


def training_table(groups: list[list[Row]]) -> str:
    """A training step: real tokens/s and peak memory."""
    lines = []
    for name in ("transformers-sdpa", "fastbert", "fastbert-recompute"):
        line = [NAMES[name].replace(", padded to the longest", "")]
        for rows in groups:
            row = next(r for r in rows if r["provider"] == name)
            base = next(r for r in rows if r["provider"] == "transformers-sdpa")
            ratio = "" if row is base else f", {times(row, base)}"
            line += [with_spread(row, name == "fastbert") + ratio, f"{float(row['peak_memory_mb']) / 1e3:.1f} GB"]
        lines.append(line)
    dtypes = [rows[0]["dtype"] for rows in groups]
    return table(["real tokens per second", *(c for d in dtypes for c in (d, f"{d}, peak memory"))], lines)


def start_table(groups: list[list[Row]]) -> str:
    """MiniLM from disk to the first vector, after the libraries' imports, ms."""
    found = [row for row in groups[0] if row["status"] == "ok"]
    lines = [[name_of(row), f"{ms(row)} ({ms(row, 'p20_ms')}–{ms(row, 'p80_ms')})"] for row in found]
    return table(["from disk to the first vector", "ms"], lines)


def memory_table(groups: list[list[Row]]) -> str:
    """Peak memory of loading and running BERT-base, MB."""
    figures = {(row["provider"], row["dtype"]): row["peak_memory_mb"] for rows in groups for row in rows}
    lines = [[name, *(f"{float(figures[name, d] or 'nan'):.0f}" for d in DTYPES)] for name in MEMORY_OF]
    return table(["MB", *DTYPES], lines).replace(" nan ", " ")


ENCODER, TARGETS, TRAINING = "encoder-cpu.csv", "targets-cpu.csv", "training-cpu.csv"
TEXTS = {"op": "encoder", "model": "minilm", "case": "log-normal texts"}
UNPADDED = {**TEXTS, "case": "no padding, no mask"}
SHAPES = [("bert-base", shape) for shape in ("1x16", "1x128", "8x128", "32x128", "32x512")]
SHAPES += [("minilm", "8x128"), ("minilm", "32x128")]
MEMORY_OF = ("transformers", "fastbert")
TABLES: dict[str, tuple[Callable[[list[list[Row]]], str], list[Source]]] = {
    "texts": (texts_table, [Source(ENCODER, TEXTS), Source(ENCODER, UNPADDED)]),
    "libraries": (providers_table, [Source(ENCODER, TEXTS)]),
    "unpadded": (providers_table, [Source(ENCODER, UNPADDED)]),
    "shapes": (
        shapes_table,
        [Source(TARGETS, {"op": "encoder", "case": "grid", "model": m, "shape": s}) for m, s in SHAPES],
    ),
    "training": (training_table, [Source(TRAINING, {"op": "training step", "dtype": d}) for d in ("fp32", "bf16")]),
    "start": (start_table, [Source(TARGETS, {"op": "start"})]),
    "memory": (
        memory_table,
        [Source(TARGETS, {"op": "memory", "provider": p, "dtype": d}) for p in MEMORY_OF for d in DTYPES],
    ),
}


def block(name: str, dates: Sequence[str] = ()) -> str:
    """The table `name` with its markers, from rows of the dates, one a source, or of the newest."""
    draw, sources = TABLES[name]
    if dates and len(dates) != len(sources):
        raise LookupError(f"table {name} names {len(dates)} dates; it has {len(sources)} sources")
    groups = [source.rows(date) for source, date in zip(sources, dates or [None] * len(sources), strict=True)]
    names = " ".join([name, *(rows[0]["date"] for rows in groups)])
    return f"<!-- rows {names} -->\n\n{draw(groups)}\n\n<!-- end of rows -->"


def texts_of(page: str, *, newest: bool) -> str:
    """The page with its tables made again, from the newest rows or from those that each table names."""

    def again(found: re.Match[str]) -> str:
        return block(found["name"], () if newest else found["dates"].split())

    return BLOCK.sub(again, page)


# The picture: left a padded grid and the packed row, right the bars. Its own background keeps it readable on any page;
# the colours follow the reader's preference for light or dark.
STYLE = """
  svg { --back: #ffffff; --ink: #1f2430; --soft: #5c6577; --line: #c3c9d4; --pad: #eef0f4; --peer: #9aa4b5;
        --best: #5b7fb0; --ours: #d2491f; }
  @media (prefers-color-scheme: dark) {
    svg { --back: #161b22; --ink: #e6e9ef; --soft: #a3adbd; --line: #465063; --pad: #222936; --peer: #76819a;
          --best: #7da2d6; --ours: #f0703f; }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); }
  .soft { fill: var(--soft); font-size: 12px; }
  .head { font-weight: 600; font-size: 14px; }
  .ours { font-weight: 600; }
  .back { fill: var(--back); stroke: var(--line); }
  .pad { fill: var(--pad); stroke: var(--line); stroke-width: 0.7; }
  .arrow { stroke: var(--soft); fill: none; stroke-width: 1.5; }
"""
LENGTHS = (16, 5, 2, 7, 3, 1, 4, 2)
HUES = ("#3d74c6", "#d2853c", "#4d9b6a", "#b0568f", "#7a68c9", "#c2a33a", "#3f9fa8", "#b5573f")
CELL = 15


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, *, kind: str = "", fill: str = "") -> str:
    paint = f'class="{kind}"' if kind else f'fill="{fill}"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" {paint}/>'


def draw_packing(left: float, top: float) -> list[str]:
    """A padded batch, one row a text, and the same tokens in one packed row."""
    width, tokens = max(LENGTHS), sum(LENGTHS)
    parts = [text(left, top, f"padded: {len(LENGTHS)} x {width} = {len(LENGTHS) * width} positions", "head")]
    for row, length in enumerate(LENGTHS):
        for column in range(width):
            x, y = left + column * CELL, top + 14 + row * CELL
            real = column < length
            parts.append(rect(x, y, CELL - 2, CELL - 2, kind="" if real else "pad", fill=HUES[row]))
    bottom, middle = top + 14 + len(LENGTHS) * CELL, left + width * CELL / 2
    parts.append(f'<path d="M{middle:g} {bottom + 8:g} v26 m-5 -6 l5 6 l5 -6" class="arrow"/>')
    parts.append(text(middle + 14, bottom + 26, "packed once, before the embeddings", "soft"))
    step, x = CELL - 5, left
    for row, length in enumerate(LENGTHS):
        for _ in range(length):
            parts.append(rect(x, bottom + 46, step - 1.5, 18, fill=HUES[row]))
            x += step
    parts.append(text(left, bottom + 86, f"packed: {tokens} tokens in one row", "head"))
    parts.append(text(left, bottom + 106, "no layer computes a pad position; unpacked once, at the end", "soft"))
    return parts


def draw_bars(rows: Sequence[Row], left: float, top: float, width: float) -> list[str]:
    """By precision: the sorted baseline, the strongest other library and fastbert, with whiskers from p20 to p80."""
    found = by_provider(rows)
    parts = [text(left, top, "real tokens per second, all-MiniLM-L6-v2", "head")]
    first = found["fastbert"]["fp32"]
    parts.append(
        text(left, top + 18, f"{first['shape'].split('x')[0]} texts of unlike lengths; {first['device']}", "soft")
    )
    full, y = 1.02 * max(speed(row) for row in found["fastbert"].values()), top + 36
    for dtype in DTYPES:
        baseline = found["transformers-sdpa-sorted"].get(dtype)
        bars = [(baseline, "peer")] if baseline else []
        bars += [(strongest(rows, dtype), "best"), (found["fastbert"][dtype], "ours")]
        parts.append(text(left, y + 11 * len(bars) + 4, dtype, "head"))
        for row, kind in bars:
            start, length = left + 46, speed(row) / full * (width - 220)
            parts.append(rect(start, y + 3, length, 16, fill=f"var(--{kind})"))
            ends = [start + speed(row, f"{p}_ms") / full * (width - 220) for p in ("p80", "p20")]
            parts.append(f'<path d="M{ends[0]:g} {y + 8:g} v6 m0 -3 H{ends[1]:g} m0 -3 v6" class="arrow"/>')
            name = "fastbert" if kind == "ours" else NAMES[row["provider"]].replace(", sdpa", "")
            parts.append(
                text(
                    max(start + length, ends[1]) + 6,
                    y + 15.5,
                    f"{speed(row):,.0f} {name}",
                    "ours" if kind == "ours" else "",
                )
            )
            y += 22
        y += 12
    return parts


def picture(date: str) -> str:
    """The SVG file, of the rows of that date."""
    rows = Source(ENCODER, TEXTS).rows(date)
    parts = [rect(0.5, 0.5, 939, 291, kind="back"), *draw_packing(24, 34), *draw_bars(rows, 468, 34, 456)]
    title = "A padded batch against the packed row, and the speed against other libraries"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 292" width="940" height="292" role="img">\n'
        f"<title>{title}</title>\n<desc>rows of {ENCODER}, {date}</desc>\n<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def made(*, newest: bool) -> dict[Path, str]:
    """Each file, as it has to be."""
    files = {ROOT / page: texts_of((ROOT / page).read_text(encoding="utf-8"), newest=newest) for page in PAGES}
    dates = next(m["dates"].split() for m in BLOCK.finditer(files[ROOT / "README.md"]) if m["name"] == "texts")
    return {**files, PICTURE: picture(dates[0])}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the rows that are named")
    chosen = parser.parse_args(arguments)
    try:
        files = made(newest=not chosen.check)
    except (LookupError, OSError) as error:
        print(f"readme_figures: {error}", file=sys.stderr)
        return 1
    stale = [p for p, content in files.items() if not p.exists() or p.read_text(encoding="utf-8") != content]
    for path in stale:
        if chosen.check:
            print(
                f"{path.relative_to(ROOT)} is not what its rows give; run benchmarks/readme_figures.py", file=sys.stderr
            )
        else:
            path.write_text(files[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
