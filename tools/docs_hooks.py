"""What the documentation site shows from outside docs/: changelog, model cards, examples, recipes.

MkDocs calls these functions by name (https://www.mkdocs.org/user-guide/plugins/#events).
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

__all__ = ["on_files", "on_page_markdown"]

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the changelog as changes.md, and each card as model_cards/NAME.md."""
    sources = {"changes.md": ROOT / "CHANGELOG.md"}
    sources |= {f"model_cards/{card.name}": card for card in (ROOT / "model_cards").glob("*.md")}
    for uri, path in sources.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put files and the list of recipes in; point links to cards at the site's copies."""
    if page.file.src_uri == "changes.md":
        return markdown.replace("](docs/", "](")
    markdown = re.sub(r"<!-- file: (\S+\.py) -->", _python_file, markdown)
    markdown = markdown.replace("<!-- recipes -->", _recipes())
    return markdown.replace("](../model_cards/", "](model_cards/")


def _python_file(found: re.Match[str]) -> str:
    return f"```python\n{(ROOT / found[1]).read_text(encoding='utf-8')}```"


def _recipes() -> str:
    """Each shipped recipe with the first sentence of its head."""
    rows = ["| recipe | what it is |", "| --- | --- |"]
    for path in sorted((ROOT / "train_scripts" / "recipes").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        head = " ".join(line[1:].strip() for line in lines[: _head_length(lines)])
        rows.append(f"| `{path.stem}` | {head} |")
    return "\n".join(rows)


def _head_length(lines: list[str]) -> int:
    """Comment lines before the one that says the command."""
    ends = ("# Command:", "# Source:")
    for number, line in enumerate(lines):
        if not line.startswith("#") or line.startswith(ends):
            return number
    return len(lines)
