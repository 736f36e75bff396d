"""The documentation: links and anchors lead somewhere, figures are those of their rows, commands and names exist."""

import re
import tomllib
from functools import cache

import pytest
import readme_figures

import fastbert

ROOT = readme_figures.ROOT
FOLDERS = ("docs", "csrc", "kernels", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.M)
BUDGET = {"README.md": 130, "csrc/README.md": 60, "kernels/README.md": 60}  # lines


def name(path):
    return path.relative_to(ROOT).as_posix()


def prose(text):
    """Without code, where brackets are no links and hashes no headings."""
    return re.sub(r"`[^`\n]*`", lambda code: code[0] if "](" not in code[0] else "", FENCE.sub("", text))


@cache
def anchors(path):
    """The anchors of a page's headings, as GitHub and the site make them."""
    found = set()
    for heading in HEADING.findall(prose(path.read_text(encoding="utf-8"))):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.add(re.sub(r"\s", "-", words))
    return found


def broken(path, text):
    """(link, reason) of each relative link of a page that leads nowhere."""
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists():
            yield link, "no such file"
        elif not file.is_relative_to(ROOT):
            yield link, "outside the repository"
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            yield link, "no such heading"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    assert not list(broken(path, path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("docs/no-such-page.md", "no such file"),
        ("docs/accelerate.md#no-such-heading", "no such heading"),
        ("#no-such-heading", "no such heading"),
        ("../elsewhere.md", "no such file"),
        ("docs/pretrain.toml#data", "no such heading"),
    ],
)
def test_broken_links_are_found(link, reason):
    assert list(broken(ROOT / "README.md", f"See [it]({link}), not `[this](x)`.\n```\n[nor](that)\n```\n")) == [
        (link, reason)
    ]


@pytest.mark.parametrize("page", BUDGET)
def test_pages_are_short(page):
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= BUDGET[page]


def test_figures_are_those_of_their_rows():
    stale = [name(p) for p, text in readme_figures.made(newest=False).items() if p.read_text(encoding="utf-8") != text]
    assert not stale, f"run python benchmarks/readme_figures.py: {stale}"


def test_a_changed_figure_is_found():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    figure = re.search(r"\*\*([\d,]+)\*\* \(", page)[1]
    assert readme_figures.texts_of(page.replace(figure, "99,999"), newest=False) == page
    with pytest.raises(LookupError, match="has no row"):
        readme_figures.texts_of(re.sub(r"rows texts \d{4}", "rows texts 1999", page), newest=False)


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_python_of_a_page_runs(page, minilm):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        names = {}
        exec(re.sub(r'"(path/or/hub-id|sentence-transformers/\S+?)"', repr(str(minilm)), block), names)
        assert names["vectors"].shape == (2, 384)


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: fastbert\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(fastbert.__all__)


def test_the_command_line_page_has_every_command(capsys):
    from fastbert.cli.main import main

    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)(?=\s)", capsys.readouterr().out, re.M)
    assert len(commands) >= 7
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^<!-- help (\S+) -->$", page, re.M) == commands


def test_every_page_is_in_the_site():
    site = (ROOT / "docs/mkdocs/mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\s+- [^:\n]+: (\S+\.md)$", site, re.M))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert pages <= shown
    assert "docs" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
