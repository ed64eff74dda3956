"""What the documentation site shows from outside docs/: changelog, model cards, examples, recipes.

MkDocs calls these functions by name (https://www.mkdocs.org/user-guide/plugins/#events).
"""

import dataclasses
import re
import sys
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
    if page.file.src_uri == "recipes.md":
        markdown = markdown.replace("<!-- recipes -->", _recipes())
        markdown = markdown.replace("<!-- settings -->", _settings())
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


def _settings() -> str:
    """Each setting with its meaning, what it takes, and its default."""
    sys.path.insert(0, str(ROOT))  # the site builds without the package's dependencies
    from timm_xformers.files.yaml_text import dump_yaml
    from timm_xformers.recipe import Recipe, allowed

    rows = ["| setting | meaning | takes | default |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(Recipe):
        value = getattr(Recipe(), field.name)
        default = dump_yaml({"x": value})[3:].strip()
        cells = (f"`{field.name}`", field.metadata["meaning"], allowed(field), f"`{default}`")
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def _head_length(lines: list[str]) -> int:
    """Comment lines before the one that says the command."""
    ends = ("# Command:", "# Source:")
    for number, line in enumerate(lines):
        if not line.startswith("#") or line.startswith(ends):
            return number
    return len(lines)
