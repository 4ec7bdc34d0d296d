"""What the site has beside the written pages: those made from code, and links that lead out of docs/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import make_api
import make_errors
import make_method_pages

COPIED = {"performance.md": "benchmarks/RESULTS.md", "contributing.md": "CONTRIBUTING.md"}
OUTWARD = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+([^)#]+)(#[^)]*)?\)")
PICTURES = (".png", ".svg")


def made() -> dict[str, str]:
    """path under docs/ -> text, of everything that is not written by hand."""
    copied = {path: (ROOT / source).read_text(encoding="utf-8") for path, source in COPIED.items()}
    return {**make_method_pages.pages(), "errors.md": make_errors.page(), "api.md": make_api.page(), **copied}


def on_config(config: Any) -> Any:
    """Give every method its place in the navigation, and leave out guides that this version does not have."""
    known = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} | {"errors.md", "api.md", *COPIED}
    methods = [*sorted(f"methods/{n.lower()}.md" for n in make_method_pages.registry.METHODS)]
    stems = (*make_method_pages.VARIANTS, *make_method_pages.STARTS)
    starts = [f"methods/{make_method_pages.page_name(stem)}" for stem in stems]
    pages: list[Any] = ["methods/index.md", {"What works where": "methods.md"}, {"By name": methods}]
    pages.append({"Variants and starts of LoRA": starts})
    for part in config.nav:
        if "Methods" in part:
            part["Methods"] = pages
        elif isinstance(part, dict):
            for name, entries in part.items():
                if isinstance(entries, list):
                    part[name] = [one for one in entries if not isinstance(one, dict) or set(one.values()) <= known]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages, and the pictures that pages show from elsewhere in the repository."""
    for path, text in made().items():
        files.append(File.generated(config, path, content=text))
    shown = {m[3] for p in DOCS.rglob("*.md") for m in OUTWARD.finditer(p.read_text(encoding="utf-8")) if m[1]}
    for path in sorted(p for p in shown if p.endswith(PICTURES) and (ROOT / p).is_file()):
        files.append(File.generated(config, f"assets/repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ become the path that they name; pictures are taken from the site's own copy."""
    folder, depth = (DOCS / page.file.src_uri).parent, page.file.src_uri.count("/")

    def turned(match: re.Match) -> str:
        picture, text, path, _ = match.groups()
        target = match[0].split("](")[1].rstrip(")").split("#")[0]
        if (folder / target).resolve().is_relative_to(DOCS):
            return match[0]
        if picture:
            return f"![{text}]({'../' * depth}assets/repository/{path})"
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"

    return OUTWARD.sub(turned, markdown)
