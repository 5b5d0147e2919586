"""Where metrics are drawn: the tab, the panel and the label of each."""

import pytest

from offloop.callbacks.resource_monitor import GpuUsage, ResourceUsage
from offloop.dashboard.curves.panels import Place, place_of_metric
from offloop.engine import Metrics
from offloop.engine.sample_numbers import numbers_of


@pytest.mark.parametrize(
    ("key", "place", "group"),
    [
        ("loss", Place("metrics", "loss", "step"), ""),
        ("val_loss", Place("metrics", "loss", "val"), ""),
        ("lr/head", Place("metrics", "lr", "head"), ""),
        ("layer/0/mean", Place("metrics", "layer/0", "mean"), "layer"),
        ("resource_usage/system_memory_bytes", Place("system", "Machine/memory", "used"), "Machine"),
        ("resource_usage/gpus/1/power_watts", Place("system", "GPU/power", "GPU 1"), "GPU"),
        (
            "resource_usage/callback_cpu_percent/Notify",
            Place("system", "Callbacks/CPU", "Notify"),
            "Callbacks",
        ),
        # Of a later version
        ("resource_usage/swap_bytes", Place("system", "Machine/swap_bytes", "step"), "Machine"),
    ],
)
def test_place_of_metric(key: str, place: Place, group: str) -> None:
    assert place_of_metric(key) == place
    assert place.group == group


def test_every_number_of_the_machine_has_a_label_of_its_own_in_a_dozen_panels() -> None:
    gpus = tuple(
        GpuUsage(
            index=index,
            utilisation_percent=1.0,
            memory_used_bytes=1,
            memory_total_bytes=2,
            temperature_celsius=40.0,
            power_watts=100.0,
        )
        for index in range(2)
    )
    usage = ResourceUsage(
        gpus=gpus,
        cuda_allocated_bytes=1,
        cuda_reserved_bytes=1,
        cuda_peak_bytes=1,
        data_wait_percent=1.0,
        compute_percent=1.0,
        callback_cpu_percent=Metrics(Notify=1.0),
        callback_held_percent=Metrics(Notify=1.0),
    )
    numbers = [name for name, _ in numbers_of(usage, "resource_usage")]
    places = [place_of_metric(name) for name in numbers if not name.endswith("/index")]
    assert all(place is not None and place.tab == "system" and place.label != "step" for place in places)
    assert len(places) == len(set(places))
    panels = {place.panel for place in places if place is not None}
    assert len(panels) == 18
    assert len([panel for panel in panels if not panel.startswith("GPU/")]) == 12
    assert place_of_metric("resource_usage/gpus/0/index") is None
