"""Who started a process: torchrun's variables, Slurm's, and what is wrong with them."""

from typing import Any, Final

import pytest

from offloop.engine import ConfigError
from offloop.engine.distributed.launch import find_launch

TORCHRUN: Final = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM: Final = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_torchrun_says_which_rank_a_process_is(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **TORCHRUN)
    launch = find_launch(strategy)
    assert launch is not None
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (3, 4, 1, 2)
    assert not launch.has_host_group and launch.host


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_group_that_has_shrunk_to_one_process_trains_alone(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    set_variables(monkeypatch, **{**TORCHRUN, **alone})
    assert find_launch(strategy) is None


def test_process_that_was_started_alone_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_launch("auto") is None
    set_variables(monkeypatch, **SLURM)
    assert find_launch("auto") is None


def test_strategy_none_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, RANK="nonsense", WORLD_SIZE="2")
    assert find_launch("none") is None


def test_ddp_in_a_process_that_was_started_alone_says_how_to_start_it() -> None:
    with pytest.raises(ConfigError, match=r"torchrun --nproc-per-node 2 script\.py"):
        find_launch("ddp")


def test_ddp_in_tasks_of_slurm_says_that_torchrun_starts_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM)
    with pytest.raises(ConfigError, match=r"2 tasks of Slurm.*srun --ntasks-per-node 1 torchrun"):
        find_launch("ddp")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": None}, "variable RANK is not set, but WORLD_SIZE and MASTER_ADDR and MASTER_PORT are"),
        ({"WORLD_SIZE": None}, "variable WORLD_SIZE is not set"),
        ({"MASTER_ADDR": ""}, "variable MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "variable MASTER_PORT is not set"),
        ({"RANK": "4"}, "RANK must be a whole number from 0 to 3, got '4'"),
        ({"RANK": "-1"}, "RANK must be a whole number from 0 to 3, got '-1'"),
        ({"RANK": "first"}, "RANK must be a whole number from 0 to 3, got 'first'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be a whole number of at least 1, got '2.0'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be a whole number from 1 to 65535, got '70000'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be a whole number of at least 0, got 'x'"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE must be a whole number from 1 to 4, got '5'"),
    ],
)
def test_variables_that_make_no_sense_are_one_error(
    variables: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, **{**TORCHRUN, **variables})
    with pytest.raises(ConfigError) as caught:
        find_launch("auto")
    assert text in str(caught.value)


@pytest.mark.parametrize(("devices", "local"), [(0, (3, 4)), (1, (0, 1)), (2, (1, 2)), (8, (3, 4))])
def test_without_local_numbers_they_follow_from_the_devices(
    devices: int, local: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    set_variables(monkeypatch, **{**TORCHRUN, "LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None})
    launch = find_launch("auto")
    assert launch is not None
    assert (launch.local_rank, launch.local_world_size) == local
