"""Hooks of mkdocs.yml: pages from outside docs/, a reference page of each package, and links to other files.

Documents link to files relative to themselves, as GitHub shows them. On the site, a link to a package goes to its
reference page, and a link to any other file to the repository, whose address is in pyproject.toml (project.urls).
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["spjax", "spjax/config.py", "spjax/tasks.py", "spjax/types.py", "spjax/vocab.py"]
MODULES += sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("spjax/*/__init__.py"))
REFERENCE = {f"reference/{Path(module).stem}.md": module for module in MODULES}  # page -> what it documents
OUTSIDE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the repository's address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url, config.edit_uri = project["urls"]["Repository"], ""
    config.repo_name = config.repo_url.removeprefix("https://github.com/")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not have."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, source in REFERENCE.items():
        module = source.removesuffix(".py").replace("/", ".")
        options = "    options: {show_submodules: false}\n" if module == "spjax" else ""  # the public names alone
        files.append(File.generated(config, page, content=f"::: {module}\n{options}"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to pages of the site, or to the repository."""
    docs = Path(config.docs_dir)
    pages = {docs: docs / "README.md"} | {
        ROOT / source: docs / name for name, source in {**REFERENCE, **OUTSIDE}.items()
    }
    source = ROOT / OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(link: re.Match[str]) -> str:
        name, hash_, anchor = link[0].partition("#")
        if not name or "://" in name:
            return link[0]
        target = (source.parent / name).resolve()
        target = pages.get(target, target)
        if target.is_relative_to(docs):
            return os.path.relpath(target, (docs / page.file.src_uri).parent) + hash_ + anchor
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target.relative_to(ROOT)}{hash_}{anchor}"

    return LINK.sub(replace, markdown)
