"""Attribution, and the page that shows one: self-contained HTML, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Attribution:
    """The share of each token in a class's logit.

    Attributes:
        text: the text, or both of a pair.
        tokens: the tokens, special ones included.
        offsets: their places in the text, (begin, end) in code points; of a special token (0, 0).
        scores: (T,) float32: what each adds.
        label, target: the class, by name and number.
        score: of the class, as the pipeline's answer has it.
        logit, baseline: of the class, for the text and for the baseline.
        delta: what is missing of completeness: the sum of the scores less `logit - baseline`; None for occlusion.
    """

    text: Any
    tokens: list[str]
    offsets: list[tuple[int, int]]
    scores: np.ndarray
    label: str
    target: int
    score: float
    logit: float
    baseline: float
    delta: float | None

    @property
    def attributions(self) -> list[tuple[str, float]]:
        """(token, score), in the order of the text."""
        return list(zip(self.tokens, self.scores.tolist(), strict=True))

    @property
    def completeness_error(self) -> float:
        """|delta| as a share of |logit - baseline|."""
        return abs(self.delta or 0.0) / max(abs(self.logit - self.baseline), 1e-12)

    def ranked(self) -> list[tuple[str, float]]:
        """(token, score), the largest effects first."""
        order = np.argsort(-np.abs(self.scores), kind="stable")
        return [(self.tokens[i], float(self.scores[i])) for i in order]


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.text { line-height: 2.2; } .text span { padding: .2em .15em; border-radius: .2em; }
.note, th { color: #666; font-weight: normal; font-size: .85rem; text-align: left; }
table { border-collapse: collapse; } td, th { padding: .1rem .6rem .1rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .7em; } .up { background: #1f6fb4; } .down { background: #d95f02; }
#map { display: grid; gap: 1px; font-size: 11px; overflow-x: auto; }
#map div { min-width: 1.2em; min-height: 1.2em; } #map .name { white-space: nowrap; padding: 0 .3em; }
#map .key { writing-mode: vertical-rl; padding: .3em 0; }
"""
_SCRIPT = """
const maps = JSON.parse(document.getElementById("data").textContent);
const names = maps.tokens, size = names.length;
const shares = Uint8Array.from(atob(maps.shares), byte => byte.charCodeAt(0));
const layer = document.getElementById("layer"), head = document.getElementById("head");
const grid = document.getElementById("map");
function cell(text, kind, share, title) {
  const box = document.createElement("div");
  box.textContent = text; box.className = kind;
  if (share !== null) { box.style.background = `rgba(31, 111, 180, ${share})`; box.title = title; }
  grid.appendChild(box);
}
function draw() {
  const start = (layer.value * maps.heads + Number(head.value)) * size * size;
  grid.replaceChildren();
  grid.style.gridTemplateColumns = `max-content repeat(${names.length}, 1.2em)`;
  cell("", "name", null);
  names.forEach(name => cell(name, "key", null));
  names.forEach((query, i) => {
    cell(query, "name", null);
    names.forEach((key, j) => {
      const share = shares[start + i * size + j];
      cell("", "", share / 100, `${query} to ${key}: ${share} %`);
    });
  });
}
layer.onchange = head.onchange = draw;
draw();
"""


def page(found: Attribution, maps: np.ndarray, near: dict[str, list[tuple[str, float]]]) -> str:
    """The text with what each token adds; the attention (L, H, T, T) by layer and head; each token's nearest."""
    title = f"{found.label}: {found.score:.3f}"
    error = "" if found.delta is None else f", {found.completeness_error:.2%} of it unaccounted for"
    note = f"logit {found.logit:.3f}, of the baseline {found.baseline:.3f}{error}"
    layers, heads = maps.shape[:2]
    shares = base64.b64encode(np.rint(100 * maps).astype(np.uint8).tobytes()).decode()  # (L, H, T, T), in per cent
    data = {"tokens": found.tokens, "heads": heads, "shares": shares}
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return "".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
            f'<p class="text">{_coloured(found)}</p>',
            f'<p class="note">Blue adds to the class, orange takes from it; {html.escape(note)}</p>',
            f"<h2>Tokens</h2>{_ranked(found, near)}",
            f"<h2>Attention</h2><p>layer {_select('layer', layers)} head {_select('head', heads)}</p>",
            '<p class="note">Rows attend to columns; the darker, the more.</p><div id="map"></div>',
            f'<script type="application/json" id="data">{told}</script><script>{_SCRIPT}</script></html>\n',
        ]
    )


def _coloured(found: Attribution) -> str:
    """The text, each token's part in the colour of its score."""
    text = found.text if isinstance(found.text, str) else " ".join(map(str, _texts(found.text)))
    most = max(float(np.abs(found.scores).max()), 1e-12)
    out, done = [], 0
    plain = isinstance(found.text, str)
    for token, (begin, end), score in zip(found.tokens, found.offsets, found.scores.tolist(), strict=True):
        if plain and end <= max(begin, done):  # a special token, or a further one of the same character
            continue
        if plain:
            out.append(html.escape(text[done:begin]))
            begin, done = max(begin, done), end
        shown = text[begin:end] if plain else f"{token} "
        colour = "31, 111, 180" if score > 0 else "217, 95, 2"
        style = f"background: rgba({colour}, {0.8 * abs(score) / most:.2f})"
        out.append(f'<span style="{style}" title="{html.escape(token)} {score:+.4f}">{html.escape(shown)}</span>')
    return "".join([*out, html.escape(text[done:])]) if plain else "".join(out)


def _texts(pair: Any) -> list[Any]:
    return list(pair.values()) if isinstance(pair, dict) else list(pair)


def _ranked(found: Attribution, near: dict[str, list[tuple[str, float]]]) -> str:
    most = max(float(np.abs(found.scores).max()), 1e-12)
    rows = ["<table><tr><th>token<th>adds<th><th>nearest tokens"]
    for token, score in found.ranked():
        bar = f'<span class="bar {"up" if score > 0 else "down"}" style="width: {6 * abs(score) / most:.2f}rem"></span>'
        names = ", ".join(html.escape(name) for name, _ in near.get(token, []))
        rows.append(f'<tr><td>{html.escape(token)}<td class="number">{score:+.4f}<td>{bar}<td class="note">{names}')
    return "".join([*rows, "</table>"])


def _select(name: str, count: int) -> str:
    options = "".join(f'<option value="{i}">{i + 1}</option>' for i in range(count))
    return f'<select id="{name}">{options}</select>'
