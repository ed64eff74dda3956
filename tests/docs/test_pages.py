"""The README's and the documentation's code does what the pages say.

Python blocks of a page run in order, in one namespace and an empty folder. Commands are parsed, and
their recipes and models looked up; those below ``<!-- run -->`` run as well, those below
``<!-- run: slow -->`` in the slow tests. ``<!-- no run: REASON -->`` spares a Python block.
"""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timm

from timm_xformers import cli
from timm_xformers.recipe import shipped_recipes, shipped_spaces

ROOT = Path(__file__).parents[2]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>run|run: slow|no run: .+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


def blocks(page):
    return [
        (found["language"], found["mark"] or "", found["code"]) for found in BLOCK.finditer(page)
    ]


def commands(code):
    """The words of each command of timm-xformers, without the program's name."""
    lines = code.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|bin/)timm-xformers ([^>|]*)", line) for line in lines]
    return [shlex.split(line[1], comments=True) for line in found if line and "..." not in line[1]]


def runnable(page):
    return [
        (language, mark, code)
        for language, mark, code in blocks(page)
        if language == "python" or mark.startswith("run")
        if not mark.startswith("no run")
    ]


COMMANDS = [
    (name, words)
    for name, page in PAGES.items()
    for language, _, code in blocks(page)
    if language in ("bash", "text")
    for words in commands(code)
]
SLOW = [name for name, page in PAGES.items() if "<!-- run: slow -->" in page]


def run_page(name, tmp_path, monkeypatch, capsys, *, slow):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for language, mark, code in runnable(PAGES[name]):
        if mark == "run: slow" and not slow:
            continue
        if language == "python":
            exec(compile(code, name, "exec"), space)
            out = capsys.readouterr().out
            for promised in re.findall(r"print\(.*\)  # (.+)$", code, flags=re.MULTILINE):
                assert promised in out
        else:
            for words in commands(code):
                assert cli.main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if runnable(page)])
def test_code_runs(name, tmp_path, monkeypatch, capsys):
    run_page(name, tmp_path, monkeypatch, capsys, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_code_runs_with_its_long_commands(name, tmp_path, monkeypatch, capsys):
    run_page(name, tmp_path, monkeypatch, capsys, slow=True)


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_are_understood(name, words):
    assert words[0] in cli.COMMANDS
    parser = argparse.ArgumentParser()
    importlib.import_module(f"timm_xformers.commands.{words[0]}").add_arguments(parser)
    parser.parse_args(words[1:])
    for option, known in (("--recipe", shipped_recipes()), ("--space", shipped_spaces())):
        if option in words:
            value = words[words.index(option) + 1]
            assert value in known or value.endswith(".yaml")
    if "--model" in words:
        model = words[words.index("--model") + 1]
        assert model.startswith(("local-dir:", "hf-hub:", "runs/")) or timm.is_model(model)


def test_there_are_pages_blocks_and_commands_to_check():
    assert len(PAGES) >= 18
    assert len(COMMANDS) >= 30
    assert (
        sum(language == "python" for page in PAGES.values() for language, *_ in blocks(page)) > 12
    )
    assert SLOW


def test_every_block_names_its_language():
    fences = {
        name: re.findall(r"^```.*$", page, flags=re.MULTILINE) for name, page in PAGES.items()
    }
    assert [name for name, found in fences.items() if "```" in found[::2]] == []


@pytest.mark.parametrize("name", PAGES)
def test_names_exist(name):
    # A name with a brace or a star is a family, not a name.
    shapes = r"`((?:(?:hybrid_)?vix_|levi[tpnl]|cc[tpnl](?:_|`)|swin_local)[a-z0-9_]*)`"
    named = {found for found in re.findall(shapes, PAGES[name]) if not found.endswith("_")}
    assert named <= {*timm.list_models(), *shipped_recipes()}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if file.name == "changes.md":
            file = ROOT / "CHANGELOG.md"
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text):
    """Names that Python-Markdown gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    cleaned = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in cleaned}


class Outside(HTMLParser):
    """Collects what a page would load from other places."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            loads = name == "src" or (name == "href" and tag == "link")
            if loads and re.match(r"(https?:)?//", value or ""):
                self.found.append((tag, value))


@pytest.mark.slow
def test_site_builds_strictly_and_loads_nothing_from_outside(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", site]
    subprocess.run(command, cwd=ROOT, check=True)
    pages = [*site.rglob("*.html")]
    assert len(pages) > len(PAGES)
    for page in pages:
        parser = Outside()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found == [], page
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "performer_relu_m64" in index
    assert "Fine-tune" in index
