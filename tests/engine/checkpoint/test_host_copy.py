"""Copies in host memory are dealt out to threads that meet once, and all of them are made."""

import threading
from collections.abc import Iterator

import pytest
import torch

from offloop.engine.checkpoint import SnapshotArena, host_copy
from offloop.engine.checkpoint.host_copy import HostCopier

needs_openmp = pytest.mark.skipif(host_copy._openmp is None, reason="torch's OpenMP cannot be reached here")


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def copier() -> Iterator[HostCopier]:
    copier = HostCopier()
    yield copier
    copier.close()
    copier.close()


def some_tensors() -> list[torch.Tensor]:
    matrix = torch.randn(40, 50)
    many = [torch.randn(size) for size in (3, 0, 1, 70, 5000, 8, 33_000, 2)]
    odd = [matrix.t(), matrix[::2], torch.tensor(7), torch.randn(4, dtype=torch.complex64).conj()]
    return [*many, *odd, torch.randn(64, 16).bfloat16(), torch.arange(900, dtype=torch.uint8)]


@pytest.mark.parametrize("group", [1, 64, 4096, 1 << 30])
def test_every_tensor_is_copied_whole(
    group: int, threads: int, copier: HostCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "GROUP_BYTES", group)
    sources = some_tensors()
    targets = [torch.empty(each.shape, dtype=each.dtype) for each in sources]
    for _ in range(3):
        for target in targets:
            target.zero_()
        copier.copy(targets, sources)
        assert all(map(torch.equal, targets, sources))
    copier.copy([], [])
    assert torch.get_num_threads() == threads


@needs_openmp
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_two_threads_copy_at_the_same_time_and_split_nothing(
    threads: int, copier: HostCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "GROUP_BYTES", 1 << 20)
    together = threading.Barrier(2)
    arrived = threading.local()  # in the thread that looks
    seen: list[tuple[str, int, int]] = []
    copy = torch._foreach_copy_

    def watch(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if not hasattr(arrived, "here"):
            arrived.here = True
            together.wait(30)
        size = sum(source.nbytes for source in sources)
        seen.append((threading.current_thread().name, torch.get_num_threads(), size))
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", watch)
    sources = [torch.randn(1000), torch.randn(3_000_000), *[torch.randn(50_000) for _ in range(60)]]
    targets = [torch.empty_like(each) for each in sources]
    copier.copy(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert len({name for name, _, _ in seen}) == 2
    assert {count for _, count, _ in seen} == {1}, "a large tensor comes in parts, and no part is split"
    sizes = [size for _, _, size in seen]
    assert sum(sizes) == sum(each.nbytes for each in sources)
    assert max(sizes) < sum(sizes) / 6


@needs_openmp
@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("where", ["caller", "helper"])
def test_a_failure_in_either_thread_is_raised_after_both_are_done(
    where: str, threads: int, copier: HostCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "GROUP_BYTES", 40)  # one tensor each
    together = threading.Barrier(2)
    caller = threading.get_ident()
    at_work: list[bool] = []

    def fail(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        together.wait(30)
        if (threading.get_ident() == caller) == (where == "caller"):
            raise RuntimeError("no such memory")
        at_work.append(True)

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    sources = [torch.randn(10), torch.randn(10)]
    with pytest.raises(RuntimeError, match="no such memory"):
        copier.copy([torch.empty_like(each) for each in sources], sources)
    assert at_work == [True]


def test_buffers_made_in_inference_mode_are_written_outside_of_it_too() -> None:
    state = {"w": torch.ones(3)}
    arena = SnapshotArena(slots=1)
    with torch.inference_mode():
        arena.take(state).release()
    with arena.take(state) as snapshot:
        assert bytes(snapshot.parts()[0].payload) == b"\0\0\x80?" * 3
    arena.close()
