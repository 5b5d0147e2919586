"""callbacks/progress_block.py: what fits where."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from offloop.callbacks.progress_block import Bar, Block


def drawn(block: Block) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as captured:
        console.print(block)
    return captured.get().splitlines()


def test_bars_have_the_same_columns() -> None:
    bars = [Bar("epoch 1/2", "0:12 left", 1, 2), Bar("step 100000/200000", "", 3, 4)]
    assert drawn(Block(bars, [], 60)) == [
        "epoch 1/2          ━━━━━━━━━━━━━━                  0:12 left",
        "step 100000/200000 ━━━━━━━━━━━━━━━━━━━━━                    ",
    ]


@pytest.mark.parametrize(
    ("done", "total", "bar"),
    [(0, 4, "━━━━━━━━"), (1, 4, "━━╺━━━━━"), (1.3, 4, "━━╸━━━━━"), (5, 4, "━━━━━━━━"), (0, 0, "━━━━━━━━")],
)
def test_bar_shows_what_is_done(done: float, total: float, bar: str) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="256")
    pieces = [each for each in console.render(Block([Bar("step", "now", done, total)], [], 17)) if each.text]
    assert "".join(each.text for each in pieces) == f"step {bar} now\n"
    assert (console.get_style("bar.finished") in [each.style for each in pieces]) is (done >= total)


def test_bar_without_an_end_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for now in range(40):
        monkeypatch.setattr("offloop.callbacks.progress_block.time.monotonic", lambda now=now: now / 15)
        (line,) = drawn(Block([Bar("step 7", "", 7, None)], [], 27))
        assert len(line) == 27
        seen.add(line[7:].replace("━", "x").strip())
    assert seen == {"", "x", "xx", "xxx", "xxxx", "xxxxx"}


@pytest.mark.parametrize("width", [20, 40, 59, 60, 200])
def test_nothing_is_wider_than_the_block_and_each_line_is_one_line(width: int) -> None:
    bars = [Bar("epoch 1000000/2000000", "1000:00:00 left", 1, 2), Bar("step 1", "40 steps/s", 0, None)]
    values = ["loss 0.25", "損失" * 60, "two\nlines \x1b[31m"]
    lines = drawn(Block(bars, values, width, title="a name that is longer than twenty columns"))
    assert len(lines) == 3 + len(values) if width < 200 else 3 + 2
    assert all(cell_len(line) <= width for line in lines)
    assert not any("\x1b" in line for line in lines)
