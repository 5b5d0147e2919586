"""Checkpoints as a version of the format writes them, kept for the versions to come.

    python tests/engine/checkpoint/format_fixtures.py tests/engine/checkpoint/fixtures/format_2

was run once, when version 2 was current. It is run again for the next version, into a directory of that version's
own; what is there already is never written anew. Version 1, that of one process, was written before, by the same
functions without ranks.
"""

import math
import shutil
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import torch
from interruptions import Cut
from rank_support import Stores

from offloop.callbacks import LearningRateScheduler, WeightAverage
from offloop.engine import Callback, RunResult, Trainer
from offloop.engine.checkpoint import CheckpointReader, CheckpointRequest, CheckpointStore, SnapshotArena
from offloop.engine.checkpoint.format import ELEMENT_CODES
from offloop.engine.checkpoint.part_store import PartStore
from offloop.engine.recovery.rank_states import OWN
from offloop.engine.run_dir import format_run_json, read_run_json
from offloop.engine.testing import tiny_loader, tiny_model

REQUEST = CheckpointRequest(
    step=3,
    epoch=1,
    batch=6,
    attempt=2,
    run_id="every_kind",
    reason="manual",
    parent="step-000000001-a1",
    metrics={"val_loss": 0.1, "nan": math.nan, "up": math.inf, "down": -math.inf},
    extra={"python": (3, 11), "seeds": {0: 2**80}},
    tags=("good",),
)

RUN = "a_run"
CUT = 5


def every_kind_of_value() -> dict[str, Any]:
    """Return a state with every element type, every way to share memory and every plain value; the same each time."""
    words = torch.arange(48, dtype=torch.uint8)
    tensors = {name: words.clone().view(getattr(torch, name)) for name in ELEMENT_CODES if name != "bool"}
    base = torch.arange(36, dtype=torch.float32).reshape(6, 6)
    neighbours = torch.arange(8, dtype=torch.int16)
    pairs = torch.arange(40, dtype=torch.float32)
    return {
        "model": {
            "weight": base,
            "tied": base,
            "transposed": base.t(),
            "column": base[:, 1],
            "__metadata__": torch.tensor([math.nan, -0.0, math.inf]),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(7),
            "overlapping": [pairs[0:20], pairs[10:40]],
        },
        "optimizer": {
            "state": {
                0: {"step": torch.tensor(3.0), "exp_avg": neighbours[:4]},
                1: {"exp_avg": neighbours[4:]},
            },
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}],
        },
        "types": {**tensors, "bool": words % 2 == 0},
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "values": [True, None, -(2**63), 2**127, 0.1, -0.0, math.nan, math.inf, -math.inf, "ü\n\x00", ""],
        "containers": (
            OrderedDict(b=1, a=2),
            Counter({3: 1}),
            {(1, "x"): {True: None}},
            [],
            {},
            {"$": ["tuple", []]},
        ),
    }


def train(directory: Path, *callbacks: Callback, **knobs: Any) -> RunResult:
    """Train with everything that has a state of its own, for as many epochs as make nine steps."""
    model = tiny_model(dropout=0.3)
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        loss=torch.nn.functional.cross_entropy,
        device="cpu",
        run_dir=str(directory),
        run_name=RUN,
        accumulate_grad_batches=2,
        seed=5,
    )
    return trainer.train(
        tiny_loader(6),
        tiny_loader(2, seed=4),
        epochs=3,
        metrics=["accuracy"],
        callbacks=[LearningRateScheduler("cosine"), WeightAverage(decay=0.5), *callbacks],
        **knobs,
    )


def write(directory: Path, request: CheckpointRequest, state: dict[str, Any], part: dict[str, Any]) -> None:
    """Write a checkpoint of two ranks."""
    stores = Stores()
    first, second = stores.channel(0), stores.channel(1)
    parts = PartStore(directory, second)
    request = msgspec.structs.replace(request, number=1)
    with CheckpointStore(directory, engine_version="0.1", ranks=first) as store:
        with SnapshotArena(slots=1, files=parts.files).take({"ranks": {"1": part}}) as snapshot:
            parts.commit(snapshot, request)
        with SnapshotArena(slots=1).take(state) as snapshot:
            store.commit(snapshot, request)


def main(directory: Path) -> None:
    """Write both."""
    directory.mkdir(parents=True)
    write(directory / "every_kind", REQUEST, every_kind_of_value(), every_kind_of_value())
    train(directory, Cut(CUT))
    # As two processes would have written it
    (path,) = (directory / RUN / "checkpoints").iterdir()
    loaded: Any = CheckpointReader(directory / RUN).load()
    head = loaded.info.manifest
    loaded.state["environment"] |= {"ranks": 2, "strategy": "ddp"}
    part = {name: loaded.state[name] for name in OWN if name in loaded.state}
    shutil.rmtree(path)
    request = CheckpointRequest(
        step=head.step, epoch=head.epoch, batch=head.batch, attempt=0, run_id=RUN, reason="manual"
    )
    write(directory / RUN, request, loaded.state, part)
    for file in ("events.jsonl", "LOCK"):
        (directory / RUN / file).unlink(missing_ok=True)
    (directory / "every_kind" / "LOCK").unlink()
    described = read_run_json(directory / RUN)  # the rest tells of one machine
    kept = {name: described[name] for name in ("run_id", "attempt", "status")}
    (directory / RUN / "run.json").write_bytes(format_run_json(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
