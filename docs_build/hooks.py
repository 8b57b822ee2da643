"""What MkDocs calls while it builds the site: generated pages, the rest of a folder in the navigation, links.

The Markdown files of this repository are read on the code host too. So they link to each other, and to files outside
`docs/`, as the repository has them; links that leave `docs/` are led to the page of the site that holds the same.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import benchmarks_page
import cli_reference
import config_reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPIES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site that lie at the top of the repository."""
HOMES = {"README.md": "index.md", "alpacache/config.py": "reference/config.md"}
"""Where the site has the same content in another form."""
BENCHMARKS = "reference/benchmarks.md"
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """In `nav`, a folder such as `how-to/` stands for the pages in it that are named nowhere else."""
    docs = Path(config.docs_dir)
    named = set(_pages(config.nav))
    config.nav = _expand(config.nav, docs, named)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside `docs/`."""
    for source, page in COPIES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in generated parts, then lead links that leave `docs/` to the site's pages."""
    name = page.file.src_uri
    source = next((original for original, copy in COPIES.items() if copy == name), None)
    here = "" if source else posixpath.dirname(f"docs/{name}")
    return led_home(generated(markdown), here=here, page=name)


def generated(markdown: str) -> str:
    """Put tables where the markers are."""
    markdown = config_reference.filled(markdown)
    if cli_reference.MARKER in markdown:
        markdown = markdown.replace(cli_reference.MARKER, cli_reference.page())
    if benchmarks_page.MARKER in markdown or benchmarks_page.HEADLINE_MARKER in markdown:
        results = benchmarks_page.read()
        markdown = markdown.replace(benchmarks_page.HEADLINE_MARKER, benchmarks_page.headline(results))
        markdown = markdown.replace(benchmarks_page.MARKER, benchmarks_page.page(results))
    return markdown


def led_home(markdown: str, *, here: str, page: str) -> str:
    """`markdown`, written in the folder `here` of the repository, with links that are right on the site's `page`."""

    def lead(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(here, target))
        home = site_page(path, anchor)
        if home is None:
            return match.group(0)
        wanted, place = home
        return posixpath.relpath(wanted, posixpath.dirname(page) or ".") + place

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(lead, part) for part in parts)


def site_page(path: str, anchor: str) -> tuple[str, str] | None:
    """Page of the site and anchor for a path in the repository; None where the link should stay as it is."""
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return ("decisions/0001-two-stages-and-one-store.md", "") if inside == "decisions" else (inside, anchor)
    if path in COPIES:
        return COPIES[path], anchor
    if path in HOMES:
        return HOMES[path], ""
    if path.startswith("benchmarks/results"):
        place = benchmarks_page.anchor(posixpath.basename(path))
        return BENCHMARKS, f"#{place}" if place else ""
    return None


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav if isinstance(nav, list) else nav.values()
    return [page for entry in entries for page in _pages(entry)]


def _expand(nav: Any, docs: Path, named: set[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _expand(entry, docs, named) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    expanded: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/"):
            others = sorted(f"{entry}{file.name}" for file in (docs / entry).glob("*.md"))
            expanded += [page for page in others if page not in named]
        else:
            expanded.append(_expand(entry, docs, named))
    return expanded
