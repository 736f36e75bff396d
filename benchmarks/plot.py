"""Draws the CSV files of the benchmarks: tokens/s by provider, one picture a model, dtype and device.

    python benchmarks/plot.py benchmarks/results/encoder-cpu.csv --output pictures

Named cases become bars, with whiskers from p20 to p80; a grid with several padding fills becomes lines over
the fill. Of rows that were measured again the last counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from harness import read_rows

Row = dict[str, str]
# One colour a provider, the same in every picture: peers in greys and blues, fastbert in warm colours.
COLOURS = {
    "transformers-eager": "#b8bcc4",
    "transformers-sdpa": "#7d848f",
    "transformers-sdpa-sorted": "#454b55",
    "torch-compile": "#86aede",
    "torch-compile-graphs": "#2f6db5",
    "torch-compile-sorted": "#b5cdf0",
    "onnxruntime": "#9fc38f",
    "onnxruntime-sorted": "#6a9f58",
    "openvino": "#b79fd6",
    "openvino-sorted": "#8b68b8",
    "ctranslate2": "#8cc7c7",
    "ctranslate2-sorted": "#4c9a9a",
    "fastbert-reference": "#f0b489",
    "fastbert-accelerate": "#e3853f",
    "fastbert": "#c8431f",
}
OTHERS = ("#a8a23a", "#9a7b4c", "#c78ca6")


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each provider and case; those without a speed do not come into a picture."""
    keys = ("op", "provider", "mode", "model", "case", "shape", "fill", "dtype", "device")
    found = {tuple(row[key] for key in keys): row for row in rows}
    return [row for row in found.values() if row["status"] == "ok" and row["tokens_per_s"]]


def groups(rows: list[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their values of `keys`, in the order of first appearance."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def colour(provider: str) -> str:
    return COLOURS.get(provider) or OTHERS[sum(provider.encode()) % len(OTHERS)]


def heading(rows: list[Row], note: str = "") -> str:
    row = rows[0]
    versions = [v for v in row["versions"].split("; ") if v.startswith(("torch", "transformers"))]
    commits = sorted({r["commit"] + ("+" if r["dirty"] == "yes" else "") for r in rows})
    return (
        f"{row['model']} {row['op']}, {row['mode']}, {row['dtype']}: real tokens/s{note}\n"
        f"{row['device']}; {', '.join(versions)}; fastbert {', '.join(commits)}; {rows[-1]['date'][:10]}"
    )


def draw_bars(plt: Any, rows: list[Row]) -> Any:
    """A panel a case, a bar a provider, with its figure and how it stands to transformers-sdpa."""
    cases = groups(rows, "case", "shape", "fill")
    heights = [len(panel) for panel in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(9, 1.2 + sum(0.34 * n + 0.75 for n in heights)),
        squeeze=False,
        height_ratios=[n + 0.6 for n in heights],
        layout="constrained",
    )
    for axis, ((case, shape, fill), panel) in zip(axes[:, 0], cases.items(), strict=True):
        speeds = [float(row["tokens_per_s"]) for row in panel]
        names = [row["provider"] for row in panel]
        tokens = float(panel[0]["tokens"])
        ends = [
            [speed - tokens / float(row["p80_ms"]) * 1e3 for speed, row in zip(speeds, panel, strict=True)],
            [tokens / float(row["p20_ms"]) * 1e3 - speed for speed, row in zip(speeds, panel, strict=True)],
        ]
        places = list(range(len(panel)))
        axis.barh(places, speeds, color=[colour(name) for name in names], height=0.74)
        whiskers = [[max(0.0, end) for end in side] for side in ends]
        axis.errorbar(speeds, places, xerr=whiskers, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
        base = dict(zip(names, speeds, strict=True)).get("transformers-sdpa")
        for place, speed, beyond in zip(places, speeds, whiskers[1], strict=True):
            text = f"{speed:,.0f}" + (f"   {speed / base:.2f}x" if base else "")
            axis.annotate(text, (speed + beyond, place), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
        axis.set_yticks(places, names, fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.22 * max(s + b for s, b in zip(speeds, whiskers[1], strict=True)))
        axis.set_title(f"{case}: {shape}, fill {float(fill):.0%}, {tokens:,.0f} real tokens", loc="left", fontsize=10)
        _plain(axis, "x")
    figure.suptitle(heading(rows, ", and against transformers-sdpa"), fontsize=10, x=0.01, ha="left")
    return figure


def draw_lines(plt: Any, rows: list[Row]) -> Any:
    """A panel a shape, a line a provider: tokens/s over the padding fill."""
    shapes = groups(rows, "shape")
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(max(9, 4.2 * columns), 3.1 * lines + 1.1),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis, ((shape,), panel) in zip(axes.flat, shapes.items(), strict=False):
        for (provider,), points in groups(panel, "provider").items():
            points.sort(key=lambda row: float(row["fill"]))
            fills = [float(row["fill"]) for row in points]
            speeds = [float(row["tokens_per_s"]) for row in points]
            (handles[provider],) = axis.plot(fills, speeds, marker="o", ms=4, color=colour(provider))
        axis.set_title(f"batch x length {shape}", loc="left", fontsize=10)
        axis.set_xlim(0, 1.03)
        axis.set_ylim(0)
        axis.set_xlabel("fill: real tokens / padded tokens", fontsize=9)
        axis.set_ylabel("real tokens/s", fontsize=9)
        _plain(axis, "y")
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(heading(rows), fontsize=10, x=0.01, ha="left")
    return figure


def _plain(axis: Any, which: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.grid(axis=which, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    getattr(axis, f"{which}axis").set_major_formatter(lambda value, _: f"{value:,.0f}")


def plot(files: list[Path], folder: Path) -> list[Path]:
    """Draws every picture that the rows of `files` give; returns the PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = latest([row for file in files for row in read_rows(file)])
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for key, group in groups(rows, "op", "mode", "model", "dtype", "device").items():
        named = [row for row in group if row["case"] != "grid"]
        grid = [row for row in group if row["case"] == "grid"]
        for kind, draw, part in (("cases", draw_bars, named), ("fill", draw_lines, grid)):
            if part:
                name = re.sub(r"[^a-z0-9]+", "-", " ".join((*key, kind)).lower()).strip("-")
                figure = draw(plt, part)
                figure.savefig(folder / f"{name}.png", dpi=140)
                plt.close(figure)
                pictures.append(folder / f"{name}.png")
    return pictures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog="example: python benchmarks/plot.py benchmarks/results/*.csv --output pictures",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV", help="results to draw")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder for the PNG files")
    chosen = parser.parse_args(arguments)
    try:
        pictures = plot(chosen.files, chosen.output)
    except (OSError, KeyError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, pictures)) or "no row with a speed")
    return int(not pictures)


if __name__ == "__main__":
    sys.exit(main())
