"""The model card of a fine-tuned model: README.md with Hugging Face front matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import write_text

CARD = "README.md"
PIPELINES = {
    "classification": "text-classification",
    "multi-label": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "multiple-choice": None,  # no pipeline of transformers has this task
    "embedding": "sentence-similarity",
    "sparse-embedding": "feature-extraction",
    "rerank": "text-ranking",
}


_LIBRARIES = dict.fromkeys(("embedding", "sparse-embedding", "rerank"), "sentence-transformers")


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes README.md from the content of metrics.json."""
    write_text(folder / CARD, model_card(folder.name, metrics))


def model_card(name: str, metrics: dict[str, Any]) -> str:
    """Data, recipe and scores, as Markdown under YAML front matter."""
    settings, start = metrics["settings"], metrics["model"]
    pipeline = PIPELINES[settings["task"]]
    # Every JSON string is also a YAML string.
    library = _LIBRARIES.get(settings["task"], "transformers")
    front = [f"library_name: {library}", "tags:", "- fastbert", f"- {settings['task']}"]
    front += [f"- {library}"] if library != "transformers" else []
    front += [f"pipeline_tag: {pipeline}"] if pipeline else []
    front += [] if Path(start).exists() else [f"base_model: {json.dumps(start)}"]
    sets = [part for part in ("dev", "test") if part in metrics]
    scores = list(dict.fromkeys(score for part in sets for score in metrics[part]))
    lines = ["---", *front, "---", "", f"# {name}", ""]
    lines += [f"`{start if not Path(start).exists() else Path(start).name}`, fine-tuned for {settings['task']}.", ""]
    lines += ["## Data", "", "| set | file | examples | cut to the length limit |", "|---|---|---|---|"]
    for part, data in metrics["data"].items():
        lines.append(f"| {part} | {_cell(Path(data['file']).name)} | {data['examples']:,} | {data['truncated']:,} |")
    if metrics["labels"]:
        lines += ["", "Labels: " + ", ".join(f"`{label}`" for label in metrics["labels"]) + "."]
    lines += ["", "## Scores", "", f"| score | {' | '.join(sets)} |", "|---|" + "---|" * len(sets)]
    for score in scores:
        values = [f"{metrics[part][score]:.4f}" if score in metrics[part] else "" for part in sets]
        lines.append(f"| {score} | {' | '.join(values)} |")
    best = metrics["best"]
    lines += ["", f"The weights are those of step {best['step']:,} of {metrics['steps']:,}: best dev {best['score']}."]
    lines += ["", "## Recipe", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_cell(json.dumps(value))} |" for key, value in settings.items() if value is not None]
    versions = ", ".join(f"{library} {version}" for library, version in metrics["versions"].items())
    return "\n".join([*lines, "", f"Trained with {versions}.", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
