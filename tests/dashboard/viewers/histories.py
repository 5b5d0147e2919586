"""What viewers can get of a history."""

from offloop.dashboard.curves.history import History


def content_of(history: History) -> tuple[object, ...]:
    """Return all that viewers can get of a history."""
    axis, curves = history.columns(range(len(history.curves)), 0, history.axis.rows, None)
    facts = [curve.facts() for curve in history.curves]
    columns = {name: column.tolist() for name, column in axis.items()}
    # NaN equals NaN in text.
    points = repr([(id, rows.tolist(), values.tolist()) for id, rows, values, _ in curves])
    return columns, points, facts, history.gaps
