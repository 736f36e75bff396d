"""What the site has beyond docs/: the Markdown files elsewhere in the repository, and the help of each command."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# A page of the site -> its file in the repository, of those that are not in docs/.
ELSEWHERE = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "csrc.md": "csrc/README.md",
    "kernels.md": "kernels/README.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()} | {"README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
SPREAD = re.compile(r"\([\d.,]+–[\d.,]+\)")
HELP = re.compile(r"<!-- help (?P<command>\S+) -->")


def on_files(files: Files, config: Any) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        on_site = PAGE_OF.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if on_site is not None:  # a page that is not there stays a broken link, which ends the build
            way = posixpath.relpath(on_site, posixpath.dirname(here) or ".")
            return f"[{found['text']}]({way}{found['anchor'] or ''})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source}: the link to {target} leads to no file")
        return found["text"] if found["text"].startswith("`") else f"`{path}`"  # code is no part of the site

    return HELP.sub(lambda found: f"```text\n{_help(found['command'])}```", LINK.sub(link, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """A spread stays on one line, in whichever column."""
    return SPREAD.sub(lambda found: f'<span class="spread">{found[0]}</span>', html)


def _help(command: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "fastbert", command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "86"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout
