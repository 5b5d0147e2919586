"""The column against a list that does the same."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloop.dashboard.curves.column import BLOCK, Column

STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 3 * BLOCK)),
    st.tuples(st.just("drop"), st.floats(0, 1)),
)


@given(st.lists(STEPS, max_size=12), st.data())
def test_it_holds_what_a_list_would(steps: list[tuple[str, Any]], data: st.DataObject) -> None:
    column, expected, added = Column("I"), list[int](), 0
    for what, amount in steps:
        if what == "add":
            for _ in range(amount):
                added += 2
                column.append(added)
                expected.append(added)
                if len(expected) % 8 == 0:
                    column.seal()
        else:
            count = int(amount * len(expected))
            column.drop(count)
            del expected[:count]
    assert len(column) == len(expected)
    assert column.read().tolist() == expected
    places = st.integers(0, len(expected))
    start, stop = sorted((data.draw(places), data.draw(places)))
    assert column.read(start, stop).tolist() == expected[start:stop]
    for index in {start, stop - 1, -1, -len(expected)} if expected else ():
        if -len(expected) <= index < len(expected):
            assert column[index] == expected[index]
    value = data.draw(st.integers(0, added + 3))
    assert column.search(value) == sum(each < value for each in expected)


@pytest.mark.parametrize(("kind", "dtype"), [("I", np.uint32), ("d", np.float64)])
def test_what_was_read_is_a_copy_of_its_own_kind(kind: Literal["d", "I"], dtype: type) -> None:
    column = Column(kind)
    assert column.read().dtype == dtype
    for number in range(BLOCK + 1):
        column.append(number)
    column.seal()
    part = column.read(0, BLOCK)
    assert part.dtype == dtype
    part[:] = 7
    assert column[0] == 0
    assert column.last(1)[0] == BLOCK


def test_blocks_stay_where_they_are() -> None:
    column = Column("d")
    for number in range(BLOCK):
        column.append(float(number))
    column.seal()
    (block,) = column._blocks
    for number in range(10 * BLOCK):
        column.append(float(number))
        column.seal()
    assert column._blocks[0] is block
    assert {each.nbytes for each in column._blocks} == {8 * BLOCK}


def test_last_none_of_the_numbers_are_none() -> None:
    column = Column("d")
    column.extend(np.arange(8.0))
    assert list(column.last(0)) == []
    assert list(column.last(2)) == [6.0, 7.0]
