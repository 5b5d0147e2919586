"""What a server sends as the live page: everything from memory, or nothing that is damaged."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from offloop.dashboard.serving.page import NOT_BUILT, Page

FILES = {
    "index.html": b'<script type="module" src="static/0123456789abcdef/page.js"></script>',
    "page.js": b"console.log('loss');" * 50,
    "page.css": b"p { color: teal }",
    "notes.txt": b"notes",
}


@pytest.fixture
def static(tmp_path: Path) -> Path:
    """A folder as the build leaves it; what the real build leaves is looked at in test_build.py."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    outputs = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    build = {"page_hash": "0123456789abcdef", "sources": "0" * 64, "outputs": outputs}
    (tmp_path / "build.json").write_text(json.dumps(build), encoding="utf-8")
    return tmp_path


def test_files_stand_under_addresses_that_carry_the_hash(static: Path) -> None:
    page = Page.load(static)
    assert page is not None
    assert page.page_hash == "0123456789abcdef"
    assert {path: asset.content_type for path, asset in page.assets.items()} == {
        "/": "text/html; charset=utf-8",
        "/static/0123456789abcdef/page.js": "text/javascript; charset=utf-8",
        "/static/0123456789abcdef/page.css": "text/css; charset=utf-8",
        "/static/0123456789abcdef/notes.txt": "text/plain; charset=utf-8",
    }


def test_asset_is_the_file_plain_and_compressed(static: Path) -> None:
    page = Page.load(static)
    assert page is not None
    asset = page.assets["/static/0123456789abcdef/page.js"]
    assert asset.body == gzip.decompress(asset.gzipped) == FILES["page.js"]
    assert len(asset.gzipped) < len(asset.body)
    assert asset.etag == f'W/"{hashlib.sha256(FILES["page.js"]).hexdigest()}"'


def test_page_is_the_same_each_time_and_cannot_be_changed(static: Path) -> None:
    page = Page.load(static)
    assert page is not None
    assert page == Page.load(static)
    with pytest.raises(TypeError):
        page.assets["/"] = NOT_BUILT  # type: ignore[index]  # that it cannot be done is the test
    with pytest.raises(AttributeError):
        page.page_hash = ""  # type: ignore[misc]


def test_page_in_memory_outlives_its_files(static: Path) -> None:
    page = Page.load(static)
    assert page is not None
    for name in FILES:
        (static / name).unlink()
    assert page.assets["/"].body == FILES["index.html"]


@pytest.mark.parametrize("name", [*FILES, "build.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damaged_page_counts_as_not_built(static: Path, name: str, damage: str) -> None:
    file = static / name
    content = file.read_bytes()
    match damage:
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case _:
            file.write_bytes(content.replace(b"0" if name == "build.json" else content[:1], b"~"))
    assert Page.load(static) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"page_hash": "a", "outputs": {}}', '{"outputs": []}'])
def test_build_json_that_says_nothing_useful_counts_as_not_built(static: Path, text: str) -> None:
    (static / "build.json").write_text(text, encoding="utf-8")
    assert Page.load(static) is None


def test_no_page_without_a_folder(tmp_path: Path) -> None:
    assert Page.load(tmp_path / "static") is None


def test_what_is_shown_instead_says_how_to_get_the_page() -> None:
    text = NOT_BUILT.body.decode()
    assert "make page" in text
    assert "pip install --no-cache-dir --force-reinstall offloop" in text
    assert NOT_BUILT.content_type == "text/html; charset=utf-8"
    assert gzip.decompress(NOT_BUILT.gzipped) == NOT_BUILT.body
