"""What `make docs` (mkdocs) builds a site of, beside docs/: the pages and files that links lead to.

In the repository a link to `../benchmarks/README.md` or `../metaformer_jax/training/recipes.py`
leads to that file. On the site pages have addresses of their own, and a file of the repository
that a page names goes along as `source/<path>`, so that no link leaves the site or breaks.
"""

import pathlib
import posixpath
import re
from typing import Any

REPOSITORY = pathlib.Path(__file__).parent.parent
# Pages that lie elsewhere than in docs/, and their names on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/cpu.md": "speed_on_cpus.md",
    "benchmarks/gpu.md": "speed_on_gpus.md",
    "benchmarks/tpu.md": "speed_on_tpus.md",
    "benchmarks/input_pipeline.md": "speed_of_the_input_pipeline.md",
}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def origin_of(page: str) -> str:
    """Where a page of the site lies in the repository."""
    origins = {name: origin for origin, name in PAGES.items()}
    return origins.get(page, f"docs/{page}")


def targets(markdown: str, page: str) -> list[str]:
    """The files that a page's relative links name, as paths in the repository."""
    folder = posixpath.dirname(origin_of(page))
    return [posixpath.normpath(posixpath.join(folder, link)) for link, _ in _LINK.findall(markdown)]


def rewrite(markdown: str, page: str) -> str:
    """The page with its relative links leading to where their targets are on the site."""
    folder = posixpath.dirname(origin_of(page))

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        return f"]({address(target)}{link[2] or ''})"

    return _LINK.sub(on_site, markdown)


def address(target: str) -> str:
    """Where a file of the repository is on the site, from its top."""
    if target in PAGES:
        return PAGES[target]
    inside = target.removeprefix("docs/")
    return inside if inside != target else f"source/{target}"


def on_files(files: Any, *, config: Any) -> Any:
    """Called by mkdocs: adds the pages that lie elsewhere, and the files that pages name."""
    from mkdocs.structure.files import File

    for origin, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / origin)))
    named = {
        target
        for file in files.documentation_pages()
        for target in targets(file.content_string, file.src_uri)
    }
    for target in sorted(named):
        if address(target).startswith("source/") and (REPOSITORY / target).is_file():
            path = str(REPOSITORY / target)
            files.append(File.generated(config, address(target), abs_src_path=path))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for each page, before it becomes HTML."""
    del config, files
    return rewrite(markdown, page.file.src_uri)
