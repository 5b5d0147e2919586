"""Every Python block of README and docs runs, page by page, from top to bottom."""

import re
from pathlib import Path
from typing import Any

import pytest

from offloop.engine import TrainerConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_blocks_of_page_run(page: Path, tmp_path: Path, warm_python: Any) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks_of(page)), encoding="utf-8")
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr


def test_training_page_lists_every_knob() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split("## Every knob")[1]
    assert not [name for name in TrainerConfig.__struct_fields__ if f"`{name}`" not in table]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in link]
    assert not [link for link in links if not is_there(page, link)]


def test_pictures_are_small_and_stand_on_a_page() -> None:
    """docs/make_pictures.py makes them."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size <= 150 * 1024, picture.name
        assert any(f"{picture.name})" in text for text in texts), picture.name


def is_there(page: Path, link: str) -> bool:
    """True if the file of a link exists and has the heading that it names."""
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in anchors_of(target))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
