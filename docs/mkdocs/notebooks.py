"""Writes docs/notebooks: tutorials as notebooks, a cell for each block of code and of text.

python docs/mkdocs/notebooks.py
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

DOCS = Path(__file__).resolve().parents[1]
TUTORIALS = ("search", "zero-shot", "explain")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n", re.M | re.S)


def notebook(name: str) -> str:
    """The notebook of a tutorial, as its file holds it."""
    text = (DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    cells, end = [], 0
    for block in BLOCK.finditer(text):
        cells.append(nbformat.v4.new_markdown_cell(_linked(text[end : block.start()])))
        cells.append(nbformat.v4.new_code_cell(("%%bash\n" if block[1] == "sh" else "") + block[2].rstrip("\n")))
        end = block.end()
    cells.append(nbformat.v4.new_markdown_cell(_linked(text[end:])))
    cells = [cell for cell in cells if cell.source]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    return nbformat.writes(made) + "\n"


def _linked(text: str) -> str:
    """Links lead from docs/notebooks where they led from docs/tutorials."""
    return re.sub(r"\]\((?!\.\./|[a-z]+:)", "](../tutorials/", text).strip()


def main() -> None:
    for name in TUTORIALS:
        path = DOCS / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(notebook(name), encoding="utf-8")


if __name__ == "__main__":
    main()
