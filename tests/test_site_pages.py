"""Links between pages lead somewhere, in the repository and on the site."""

import importlib
import operator
import pathlib
import re
import runpy
import sys

import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).parent.parent
SITE = runpy.run_path(str(REPOSITORY / "tools" / "site_pages.py"))
NAMES = sorted(
    {*SITE["PAGES"].values(), *(path.name for path in (REPOSITORY / "docs").glob("*.md"))}
)


def _text(page):
    return (REPOSITORY / SITE["origin_of"](page)).read_text()


@pytest.mark.parametrize("page", NAMES)
def test_every_link_of_a_page_names_a_file_of_the_repository(page):
    missing = [
        target
        for target in SITE["targets"](_text(page), page)
        if not (REPOSITORY / target).exists()
    ]
    assert not missing


def test_links_lead_to_pages_and_to_copies_of_other_files():
    links = {
        ("index.md", "docs/training.md"): "training.md",
        ("index.md", "LICENSE"): "source/LICENSE",
        ("index.md", "docs/accuracy.png"): "accuracy.png",
        ("training.md", "weights.md#verify"): "weights.md#verify",
        ("training.md", "../benchmarks/README.md#models"): "benchmarks.md#models",
        ("benchmarks.md", "../docs/compile.md"): "compile.md",
        ("data.md", "../metaformer_jax/main.py"): "source/metaformer_jax/main.py",
        ("data.md", "https://image-net.org/"): "https://image-net.org/",
        ("data.md", "#order"): "#order",
    }
    for (page, link), expected in links.items():
        assert SITE["rewrite"](f"See [it]({link}).", page) == f"See [it]({expected})."


def test_each_page_is_in_the_navigation_once():
    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for each in inner for page in pages(each)]

    assert sorted(pages(navigation)) == NAMES


def test_every_name_of_the_reference_is_there_by_its_dotted_path():
    names = re.findall(r"^::: (metaformer_jax\.\S+)$", _text("api.md"), flags=re.MULTILINE)
    assert len(names) > 40
    for name in names:
        package, _, path = name.partition(".")
        module = importlib.import_module(name.rpartition(".")[0])
        assert operator.attrgetter(path)(sys.modules[package]).__doc__
        assert operator.attrgetter(name.rpartition(".")[2])(module).__doc__


def test_the_site_fetches_nothing():
    assert yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["theme"]["font"] is False
