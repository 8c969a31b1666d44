"""The documentation against the code: generated tables, links, the index of messages, the pages of the site."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from code_messages import messages

from llava_packing_tower.data.images import ImageReading
from llava_packing_tower.data.native_config import DEFAULT_MIN_PATCHES
from llava_packing_tower.integrations.llava.arguments_table import PLUGIN_ARGUMENTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("make_tables", DOCS / "scripts" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_generated_tables_are_those_of_the_code(tables, page):
    text = page.read_text("utf-8")
    assert tables.filled(text) == text, f"run: python docs/scripts/make_tables.py ({page.name} differs from the code)"


def test_every_key_and_option_is_in_a_table(tables):
    assert {part[1] for page in PAGES for part in tables.PART.findall(page.read_text("utf-8"))} <= tables.TABLES.keys()
    used = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    assert all(f"<!-- table: {name} -->" in used for name in tables.TABLES)
    keys = (DOCS / "configuration.md").read_text("utf-8")
    assert all(f"\n| `{argument.name}` |" in keys for argument in PLUGIN_ARGUMENTS)


def test_the_defaults_in_the_help_are_those_of_the_code(tables):
    stated = {a.name.removeprefix("mm_packing_"): tables.DEFAULT.search(a.help) for a in PLUGIN_ARGUMENTS}
    reading = ImageReading()
    for name in ("exif", "background", "max_pixels", "max_aspect"):
        assert stated[name][1] == str(getattr(reading, name)).lower()
    assert stated["min_patches"][1] == str(DEFAULT_MIN_PATCHES)


# ---------------------------------------------------------------- links and pages


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that are the same on GitHub and on the site of mkdocs."""
    titles = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles]
    once = [title for title in plain if plain.count(title) == 1]
    return {title.replace(" ", "-") for title in once if not re.search(r"[ -]{2}", title)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text("utf-8"))
    assert not re.search(r"^\[[^\]]+\]: ", text, re.MULTILINE), "links are written [text](target)"
    for target in re.findall(r"\]\(([^)\s]+)\)|<(?:a|img)[^>]* (?:href|src)=\"([^\"]+)\"", text):
        target = "".join(target)
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"
        # The site is made of docs/ alone.
        assert page.parent != DOCS or DOCS in linked.parents, f"{page.name}: {target} is outside of docs/"


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = re.findall(r"[\w/]+\.md", str(site["nav"]))
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text("utf-8")
    named = re.findall(r"`((?:docs|benchmarks|configs|train_scripts|requirements|tests)/[\w/.\-]+\.\w+)`", text)
    for results in re.findall(r"`([\w\-]+_20\d\d-[\w\-]+\.json)`", text):
        named.append(f"benchmarks/results/{results}")
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing, f"{page.name} names {missing}"


# ---------------------------------------------------------------- messages


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    ours = text[text.index("## Messages of this package") : text.index("## Messages of the hosts")]
    indexed = re.findall(r"^\| `([^`]+)` \|", ours, re.MULTILINE)
    assert len(indexed) > 30
    known = messages()
    for message in indexed:
        parts = [part for part in re.split(r" ?\.\.\. ?", message) if part]
        pattern = re.compile(r".*?".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no such message in the code: {message}"


def test_patches_of_the_troubleshooting_page_exist():
    from llava_packing_tower.integrations.llava import compat

    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    hosts = text[text.index("## Messages of the hosts") : text.index("These have no patch")]
    named = re.findall(r"\| `(\w+)`", hosts)
    assert len(named) > 15 and set(named) <= compat.load_all().keys()
