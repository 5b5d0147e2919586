"""A snapshot is a copy of one moment, made once for tensors that share memory."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offloop.engine.checkpoint import (
    CheckpointRequest,
    CheckpointStore,
    SnapshotArena,
    SnapshotBusyError,
    UnserializableStateError,
)
from offloop.engine.checkpoint.layout import plan_layout


def through_disk(directory: Path, state: object) -> object:
    with CheckpointStore(directory) as store, SnapshotArena(slots=1).take(state) as snapshot:
        store.commit(snapshot, CheckpointRequest(step=1))
        store.verify("last")
        return store.load().state


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_tied_weights_are_stored_once_and_come_back_tied(run_directory: Path) -> None:
    weight = torch.randn(50, 20)
    state = {"model": {"emb": weight, "head": weight, "view": weight.view(-1)}, "ema": [weight]}
    loaded = through_disk(run_directory, state)
    assert isinstance(loaded, dict)
    model = loaded["model"]
    assert model["emb"] is model["head"] and loaded["ema"][0] is model["emb"]
    assert shares_memory(model["view"], model["emb"])
    (file,) = (run_directory / "checkpoints" / "step-000000001-a1").glob("*.safetensors")
    assert file.stat().st_size == 4096 + weight.numel() * 4


def test_a_model_with_tied_parameters_round_trips(run_directory: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    loaded = through_disk(run_directory, {"model": model.state_dict()})
    assert isinstance(loaded, dict)
    assert loaded["model"]["0.weight"] is loaded["model"]["2.weight"]
    model.load_state_dict(loaded["model"])


@pytest.mark.parametrize(
    "make",
    [
        lambda b: [b[2:5], b],
        lambda b: [b.t(), b[:, 1]],
        lambda b: [b[:, ::2], b[:, 1::2]],
        lambda b: [b[:4], b[2:]],
        lambda b: [b.view(torch.int16), b],
        lambda b: [b[0:1].expand(5, 6), b],
        lambda b: [b.view(-1)[1:3].view(torch.int16), b.view(-1)[2:5]],
        lambda b: [b.view(-1)[2:6].view(torch.float64), b.view(-1)[1:4]],
        lambda b: [b.permute(1, 0)[1:3], b.view(2, 3, 6)[1], b.diagonal()],
    ],
)
def test_overlapping_views_come_back_overlapping(
    run_directory: Path, make: Callable[[torch.Tensor], list[torch.Tensor]]
) -> None:
    originals = make(torch.randn(6, 6))
    loaded = through_disk(run_directory, originals)
    assert isinstance(loaded, list)
    for one, other in zip(originals, loaded, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
        assert shares_memory(other, loaded[0])
    # Writing through one is seen through the others, just as it was.
    originals[0].fill_(3)
    loaded[0].fill_(3)
    for one, other in zip(originals, loaded, strict=True):
        assert torch.equal(one, other)


def test_neighbours_in_one_buffer_stay_apart(run_directory: Path) -> None:
    buffer = torch.randn(12)
    loaded = through_disk(run_directory, {"model": {"a": buffer[:6].view(2, 3), "b": buffer[6:]}})
    assert isinstance(loaded, dict)
    assert not shares_memory(loaded["model"]["a"], loaded["model"]["b"])
    layout = plan_layout([("model.a", buffer[:6]), ("model.b", buffer[6:])])
    assert not layout.views and [copy.stored.name for copy in layout.copies] == ["a", "b"]


def test_conjugates_and_negatives_are_saved_by_value(run_directory: Path) -> None:
    base = torch.randn(4, dtype=torch.complex64)
    state = [base, base.conj(), base.conj().imag]
    loaded = through_disk(run_directory, state)
    assert isinstance(loaded, list)
    assert all(torch.equal(a, b) for a, b in zip(state, loaded, strict=True))


def test_other_tools_can_read_the_model_file(run_directory: Path) -> None:
    from safetensors.torch import load_file

    model = torch.nn.Linear(3, 2)
    through_disk(run_directory, {"model": model.state_dict(), "step": 3})
    file = run_directory / "checkpoints" / "step-000000001-a1" / "model.safetensors"
    read = load_file(file)
    assert set(read) == {"weight", "bias"} and torch.equal(read["weight"], model.weight)


def test_the_optimizer_comes_back_with_its_types(run_directory: Path) -> None:
    """Half-precision parameters with float moments: dtypes are those that were saved."""
    state: dict[str, dict[str, object]] = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
        },
        "model": {"p": torch.randn(3, dtype=torch.bfloat16)},
    }
    loaded = through_disk(run_directory, state)
    assert isinstance(loaded, dict)
    assert loaded["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert loaded["model"]["p"].dtype == torch.bfloat16


def test_names_that_meet_are_kept_apart(run_directory: Path) -> None:
    state = {"x": {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2), "b~": torch.tensor(3)}}}
    loaded = through_disk(run_directory, state)
    assert isinstance(loaded, dict)
    assert loaded["x"] == state["x"]


def test_names_that_the_format_reserves_are_changed(run_directory: Path) -> None:
    loaded = through_disk(run_directory, {"model": {"__metadata__": torch.tensor(1)}})
    assert loaded == {"model": {"__metadata__": torch.tensor(1)}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        torch.nn.parameter.UninitializedParameter,
    ],
    ids=["sparse", "meta", "quantized", "nested", "uninitialized"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_memory_are_refused_by_name(
    make: Callable[[], torch.Tensor],
) -> None:
    arena = SnapshotArena(slots=1)
    with pytest.raises(UnserializableStateError) as caught:
        arena.take({"model": {"odd": make()}})
    assert caught.value.path == ".model.odd"
    arena.take({"model": {"fine": torch.ones(1)}}).release()  # the slot is free again


def test_changes_after_the_snapshot_are_not_in_it(run_directory: Path) -> None:
    state: dict[str, object] = {"t": torch.ones(5), "list": [1], "n": 1}
    with CheckpointStore(run_directory) as store, SnapshotArena().take(state) as snapshot:
        tensor, numbers = state["t"], state["list"]
        assert isinstance(tensor, torch.Tensor) and isinstance(numbers, list)
        tensor.zero_()
        numbers.append(2)
        state["n"] = 2
        store.commit(snapshot, CheckpointRequest(step=1))
        loaded = store.load().state
    assert isinstance(loaded, dict)
    assert torch.equal(loaded["t"], torch.ones(5)) and loaded["list"] == [1] and loaded["n"] == 1


def test_snapshots_leave_no_graph_and_work_in_inference_mode() -> None:
    weight = torch.ones(3, requires_grad=True)
    version = weight._version
    with SnapshotArena().take({"model": {"w": weight * 2, "leaf": weight}}):
        assert weight._version == version and weight.grad is None
    with torch.inference_mode():
        SnapshotArena().take([torch.ones(2)]).release()


def test_structure_may_change_between_snapshots(run_directory: Path) -> None:
    arena = SnapshotArena(slots=2)
    with CheckpointStore(run_directory) as store:
        for step in range(1, 12):
            state = {"model": {str(i): torch.full((i,), step) for i in range(step % 5)}, "n": step}
            with arena.take_nowait(state) as snapshot:
                store.commit(snapshot, CheckpointRequest(step=step))
            loaded = store.load().state
            assert isinstance(loaded, dict) and loaded["n"] == step
            assert [int(t.sum()) for t in loaded["model"].values()] == [step * i for i in range(step % 5)]


def test_memory_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"model": {"w": torch.randn(1000)}}
    arena = SnapshotArena(slots=2)
    arena.prepare(state)
    monkeypatch.setattr(torch, "empty", None)  # any allocation would fail
    addresses = set()
    for _ in range(6):
        with arena.take_nowait(state) as snapshot:
            addresses.add(id(snapshot._slot.targets[0]))
    assert len(addresses) <= 2


def test_no_more_snapshots_than_slots() -> None:
    arena = SnapshotArena(slots=2)
    first, second = arena.take_nowait([torch.ones(1)]), arena.take_nowait([torch.ones(1)])
    with pytest.raises(SnapshotBusyError) as caught:
        arena.take_nowait([torch.ones(1)])
    assert caught.value.slots == 2
    with pytest.raises(SnapshotBusyError):
        arena.take([torch.ones(1)], timeout=0.01)
    first.release()
    first.release()  # twice is fine, and gives one slot back, not two
    third = arena.take_nowait([torch.ones(1)])
    with pytest.raises(SnapshotBusyError):
        arena.take_nowait([torch.ones(1)])
    first.release()  # an old handle cannot free what somebody else holds now
    with pytest.raises(SnapshotBusyError):
        arena.take_nowait([torch.ones(1)])
    second.release()
    third.release()


def test_waiting_ends_when_a_slot_is_released_or_the_arena_closed() -> None:
    arena = SnapshotArena(slots=1)
    held = arena.take([torch.ones(1)])
    threading.Thread(target=held.release).start()
    held = arena.take([torch.ones(1)], timeout=10)
    threading.Thread(target=arena.close).start()
    with pytest.raises(SnapshotBusyError):
        arena.take([torch.ones(1)], timeout=10)
    held.release()
    arena.close()


def test_a_default_device_does_not_move_the_buffers() -> None:
    state = [torch.ones(3)]
    with torch.device("meta"), SnapshotArena().take(state) as snapshot:
        assert bytes(snapshot.parts()[0].payload) == b"\0\0\x80?" * 3


@pytest.mark.parametrize("arguments", [{"slots": 0}, {"files": {"model": "MANIFEST.json"}}])
def test_wrong_arguments_are_named(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SnapshotArena(**arguments)  # type: ignore[arg-type]  # wrong on purpose
