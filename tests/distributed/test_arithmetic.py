"""The arithmetic of a run on two ranks: that of a hand-written loop on DistributedDataParallel, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
from rank_scripts import arithmetic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BY_HAND = (
    "plain",
    "dropout",
    "batch_norm",
    "accumulation",
    "clipping",
    "bf16",
    "uneven",
    "single_sample_at_the_end",
    "everything",
)
MANUAL = ("gan", "two_backward_passes")


@pytest.fixture(scope="module")
def ran(run_scenarios: Callable[..., Any]) -> Any:
    return run_scenarios("arithmetic", [*BY_HAND, *MANUAL])


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_and_losses_equal_the_hand_written_loop(name: str, ran: Any) -> None:
    first, second = ran.of(name)
    for each in (first, second):
        assert each["weights"] == first["by_hand"]["weights"]
        assert each["random_state"] == each["by_hand"]["random_state"], (
            "each rank draws what it draws by hand"
        )
    assert first["buffers"] == first["by_hand"]["buffers"]
    assert first["losses"] == pytest.approx(first["by_hand"]["losses"], abs=1e-6)
    assert first["outcome"] == second["outcome"]


@pytest.mark.parametrize("name", MANUAL)
def test_manual_steps_equal_one_process(name: str, ran: Any) -> None:
    alone = getattr(arithmetic, name)()
    first, second = ran.of(name)
    assert first["weights"] == second["weights"]
    assert first["numbers"] == pytest.approx(alone["numbers"], abs=1e-5)
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert first["outcome"]["steps"] == alone["outcome"]["steps"]
