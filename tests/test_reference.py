"""The parts of the pages that are made from docstrings are up to date, and the pages mention every public name."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import offloop.callbacks
from offloop.engine import Callback, Event, UnknownEvent, decode, encode

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()
PAGES = {page.name: page.read_text(encoding="utf-8") for page in script.PAGES}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if script.PART.search(text)])
def test_page_is_what_docstrings_make_of_it(page: str) -> None:
    assert script.make_page(PAGES[page]) == PAGES[page], "run `make docs`"


def test_each_event_has_an_example_that_decodes() -> None:
    examples = re.findall(r"^### (\w+)$.*?^```json\n(.*?)^```$", PAGES["events.md"], re.MULTILINE | re.DOTALL)
    assert [name for name, _ in examples] == [event.__name__ for event in script.documented_events()]
    for name, data in examples:
        event = decode(data.encode())
        assert type(event).__name__ == name
        assert isinstance(event, UnknownEvent) or decode(encode(event)) == event


def test_the_trainer_and_each_callback_and_rule_have_a_table_of_its_arguments() -> None:
    tables = re.findall(r"<!-- made: arguments (\w+) -->", "".join(PAGES.values()))
    public = {name: getattr(offloop.callbacks, name) for name in offloop.callbacks.__all__}
    with_arguments = [
        name
        for name, cls in public.items()
        if issubclass(cls, Callback | offloop.callbacks.Rule) and cls.__init__ is not object.__init__
    ]
    assert sorted(tables) == sorted(["Dashboard", "Trainer", *with_arguments])


@pytest.mark.parametrize("module", script.MODULES)
def test_pages_mention_every_public_name(module: str) -> None:
    words = set(re.findall(r"\w+", "".join(PAGES.values())))
    assert not [name for name in script.public_names()[module] if name not in words]


def test_design_page_lists_every_package() -> None:
    listed = re.findall(r"^\| `(\w+)/` \|", PAGES["design.md"], re.MULTILINE)
    folders = (
        path.parent.name
        for folder in ("engine", "dashboard")
        for path in (ROOT / folder).glob("*/__init__.py")
    )
    assert sorted(listed) == sorted(folders)


def test_a_page_that_is_out_of_date_is_found() -> None:
    outdated = PAGES["events.md"].replace(Event.__name__, "Something", 1).replace("| int |", "| float |", 1)
    assert script.make_page(outdated) != outdated
