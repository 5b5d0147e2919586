"""dashboard/curves/units.py: the units of curves."""

import pytest

from offloop.dashboard.curves.units import unit_of


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("resource_usage/memory_bytes", "bytes"),
        ("resource_usage/disk_read_bytes_per_second", "bytes/s"),
        ("resource_usage/steps_per_second", "1/s"),
        ("resource_usage/callback_cpu_percent/Notify", "percent"),
        ("resource_usage/gpus/0/temperature_celsius", "celsius"),
        ("gradient_statistics/nan_share", "share"),
        ("resource_usage/loop_lag", "seconds"),
        ("tokens_per_second", "1/s"),
        ("loss", ""),
        ("bytes", ""),
    ],
)
def test_name_or_declaration_gives_the_unit(key: str, unit: str) -> None:
    assert unit_of(key, {"loop_lag": "seconds"}) == unit


def test_declaration_is_asked_first() -> None:
    assert unit_of("own/queue_bytes", {"queue_bytes": "pages"}) == "pages"
