"""Panels of the page: which one shows a metric, by the metric's name."""

import re
from typing import Final, Literal, NamedTuple

_SPLITS: Final = {"train_": "train", "val_": "val", "eval_": "eval"}

_RESOURCES: Final = "resource_usage/"
"""Begin of the names of what `ResourceMonitor` measures."""


class Place(NamedTuple):
    """Where a metric is drawn."""

    tab: Literal["metrics", "system"]
    panel: str
    label: str
    """Its name within the panel."""

    @property
    def group(self) -> str:
        """Group of the panel: the part of its name before the first `/`; empty if there is none."""
        return self.panel.partition("/")[0] if "/" in self.panel else ""


_SYSTEM: Final = {
    "cpu_percent": ("Machine/CPU", "this process, of one core"),
    "system_cpu_percent": ("Machine/CPU", "all processes, of all cores"),
    "memory_bytes": ("Machine/memory", "this process"),
    "system_memory_bytes": ("Machine/memory", "used"),
    "system_memory_total_bytes": ("Machine/memory", "total"),
    "disk_read_bytes_per_second": ("Machine/disk", "read"),
    "disk_written_bytes_per_second": ("Machine/disk", "written"),
    "network_received_bytes_per_second": ("Machine/network", "in"),
    "network_sent_bytes_per_second": ("Machine/network", "out"),
    "threads": ("Machine/threads", "this process"),
    "cuda_allocated_bytes": ("GPU/tensors", "allocated"),
    "cuda_reserved_bytes": ("GPU/tensors", "reserved"),
    "cuda_peak_bytes": ("GPU/tensors", "peak"),
    "data_wait_percent": ("Training/time", "waiting for data"),
    "compute_percent": ("Training/time", "computing"),
    "steps_per_second": ("Training/steps a second", "steps"),
    "samples_per_second": ("Training/samples a second", "samples"),
    "loop_lag": ("Training/event loop late", "longest"),
    "loop_lag_mean": ("Training/event loop late", "mean"),
    "interpreter_lag": ("Training/interpreter late", "longest"),
    "interpreter_lag_mean": ("Training/interpreter late", "mean"),
    "own_cpu_percent": ("Callbacks/CPU", "ResourceMonitor"),
}
"""Panels and labels of the fields of `ResourceUsage`: what is used stands with the total, what comes in with what goes
out."""

_BY_CALLBACK: Final = {
    "callback_cpu_percent": "Callbacks/CPU",
    "callback_held_percent": "Callbacks/event loop held",
}

_GPU: Final = {
    "utilisation_percent": "GPU/utilisation",
    "temperature_celsius": "GPU/temperature",
    "power_watts": "GPU/power",
}


def place_of_metric(key: str) -> Place | None:
    """Return where a metric is drawn; None if it is no curve.

    `val_loss` is drawn in the panel `loss`, `layer/0/mean` in the group `layer`. The rates of parameter groups, such as
    `lr/head`, share the panel of the run's `lr`. What a run uses of its machine has a tab of its own.
    """
    if key.startswith(_RESOURCES):
        return _place_of_resource(key.removeprefix(_RESOURCES))
    if key.startswith("lr/"):
        return Place("metrics", "lr", key.removeprefix("lr/"))
    for prefix, split in _SPLITS.items():
        if key.startswith(prefix):
            return Place("metrics", key.removeprefix(prefix), split)
    if key.count("/") > 1:
        # One value per layer: all in one panel.
        panel, _, label = key.rpartition("/")
        return Place("metrics", panel, label)
    return Place("metrics", key, "step")


def _place_of_resource(name: str) -> Place | None:
    if name in _SYSTEM:
        return Place("system", *_SYSTEM[name])
    field, _, item = name.partition("/")
    if field in _BY_CALLBACK:
        return Place("system", _BY_CALLBACK[field], item)
    gpu = re.fullmatch(r"gpus/(\d+)/(\w+)", name)
    if gpu is None:
        return Place("system", f"Machine/{name}", "step")
    device, field = gpu.groups()
    if field == "index":
        return None
    if field in ("memory_used_bytes", "memory_total_bytes"):
        return Place("system", f"GPU/memory of GPU {device}", "used" if "used" in field else "total")
    return Place("system", _GPU.get(field, f"GPU/{field}"), f"GPU {device}")
