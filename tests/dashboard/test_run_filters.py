"""The page and the command line make the same of any filter: the page's own code runs in Node.js."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from run_filters import filter_texts, found_by, patterns

from offloop.engine import ConfigError, RunRecord, sort_runs
from offloop.engine.catalog.pattern import Pattern

WEB: Final = Path(__file__).parents[2] / "dashboard" / "web"

pytestmark = [
    # npm fetches the bundler
    pytest.mark.slow,
    pytest.mark.skipif(not (WEB / "tests").exists(), reason="the page's sources are not here"),
    pytest.mark.skipif(
        not (shutil.which("node") and shutil.which("npm")), reason="building the page needs Node.js"
    ),
]


@pytest.fixture(scope="module")
def answers_of_the_page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that asks the page's code."""
    spec = importlib.util.spec_from_file_location("build_page", WEB / "build_page.py")
    assert spec is not None and spec.loader is not None
    build_page = importlib.util.module_from_spec(spec)
    sys.modules["build_page"] = build_page
    spec.loader.exec_module(build_page)
    folder = tmp_path_factory.mktemp("page")
    build_page.fetch(folder, build_page.find_node())
    script = folder / "answers.mjs"
    esbuild = folder / "node_modules" / "esbuild" / "bin" / "esbuild"
    subprocess.run(
        [
            *("node", os.fspath(esbuild), os.fspath(WEB / "tests" / "answers.ts"), f"--outfile={script}"),
            *("--bundle", "--platform=node", "--format=esm", "--log-level=error"),
        ],
        check=True,
    )

    def ask(**questions: Any) -> Any:
        text = json.dumps(questions)
        done = subprocess.run(
            ["node", script],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"TZ": "UTC"},
        )
        return json.loads(done.stdout)

    return ask


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Return many random values."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, phases=[Phase.generate], deadline=None)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def in_order(names: list[str]) -> list[str]:
    runs = [RunRecord(key=name, directory="", id=name, state="lost") for name in names]
    return [each.id for each in sort_runs(runs, "id")]


def is_in(source: str, text: str) -> bool | str:
    try:
        return Pattern(source).is_in(text)
    except ConfigError as error:
        return str(error)


@pytest.mark.usefixtures("in_utc")
def test_the_page_and_the_command_line_make_the_same_of_any_filter(answers_of_the_page: Any) -> None:
    filters = examples(filter_texts(), 1_500)
    texts = st.text(st.sampled_from("abC1-_ .\n"), max_size=8) | st.text(max_size=8)
    asked = examples(st.tuples(patterns() | st.text(max_size=12), texts), 1_000)
    names = examples(
        st.lists(st.text(st.sampled_from("aB01_\ue000\U0001f600"), max_size=5), unique=True), 300
    )
    answers = answers_of_the_page(filters=filters, patterns=asked, names=names)
    found = [found_by(text) for text in filters]
    assert dict(zip(filters, answers["filters"], strict=True)) == dict(zip(filters, found, strict=True))
    assert [[*case, answer] for case, answer in zip(asked, answers["patterns"], strict=True)] == [
        [*case, is_in(*case)] for case in asked
    ]
    assert answers["names"] == [in_order(each) for each in names]
    # Not only what is refused
    assert sum(not each.startswith("error") and each != "" for each in found) > 100
