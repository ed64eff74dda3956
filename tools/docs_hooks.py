"""What the documentation site shows from outside docs/: the changelog and the model cards.

MkDocs calls these functions by name (https://www.mkdocs.org/user-guide/plugins/#events).
"""

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
    """Point links to the cards at the site's copies: pages lie in docs/, cards beside it."""
    if page.file.src_uri == "changes.md":
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../model_cards/", "](model_cards/")
