"""dashboard/runs/rows.py: a viewer's list of runs is the server's, however it changes and however late it is read."""

from hypothesis import given
from hypothesis import strategies as st
from memory_link import PageModel

from offloop.dashboard.protocol.from_server import Rows, RunRow
from offloop.dashboard.runs.rows import ROWS_AT_ONCE, RowCursor, RunList


def row(key: str, step: int = 0) -> RunRow:
    return RunRow(key=key, id=key, name=key, state="running", started=1.0, step=step)


def read_all(cursor: RowCursor, page: PageModel) -> int:
    """Take all that a viewer may have; return the number of messages."""
    count = 0
    while (message := cursor.next()) is not None:
        page.take(message, True)
        count += 1
    return count


CHANGES = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "read"]), st.integers(0, 5), st.integers(0, 3)), max_size=60
)


@given(changes=CHANGES)
def test_after_any_changes_a_viewer_has_the_rows_of_the_server(changes: list[tuple[str, int, int]]) -> None:
    runs = RunList()
    early, page = RowCursor(runs), PageModel()
    for action, key, step in changes:
        if action == "put":
            runs.put(row(str(key), step))
        elif action == "remove":
            runs.remove(str(key))
        else:
            early.allow()
            read_all(early, page)
    early.allow()
    read_all(early, page)
    late = PageModel()
    read_all(RowCursor(runs), late)
    assert page.rows == late.rows == runs.rows
    assert early.next() is None


def test_many_rows_come_in_parts_and_a_change_alone() -> None:
    runs, page = RunList(), PageModel()
    count = 2 * ROWS_AT_ONCE + 1
    for number in range(count):
        runs.put(row(str(number)))
    cursor = RowCursor(runs)
    assert read_all(cursor, page) == 3
    assert [(len(each.rows), each.more, each.total) for each in page.rows_messages] == [
        (ROWS_AT_ONCE, True, count),
        (ROWS_AT_ONCE, True, count),
        (1, False, count),
    ]
    assert list(page.rows) == list(runs.rows)
    runs.put(row("7"))  # the same as before
    cursor.allow()
    assert cursor.next() is None
    runs.put(row("7", step=1))
    runs.put(row("7", step=2))
    runs.remove("8")
    assert cursor.next() is None, "not before its time"
    cursor.allow()
    assert read_all(cursor, page) == 1
    assert page.rows_messages[-1] == Rows(rows=[row("7", step=2)], removed=["8"], total=count - 1)


def test_an_empty_list_is_answered() -> None:
    page = PageModel()
    assert read_all(RowCursor(RunList()), page) == 1
    assert page.rows_messages == [Rows(rows=[])]
