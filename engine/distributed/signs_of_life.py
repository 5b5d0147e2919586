"""Signs of life of the ranks; being written."""

from collections.abc import Callable
from typing import Any

from offloop.engine.distributed.launch import Launch
from offloop.engine.errors import RankFailedError


class SignsOfLife:
    """Who has failed."""

    def __init__(
        self,
        store: Any,
        launch: Launch,
        run_key: str,
        *,
        timeout: float,
        fail: Callable[[RankFailedError], None],
        attention: Callable[[], None],
    ) -> None:
        self.excused = False
        self.wants_attention = False
        self.place = (0, 0)

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End."""

    def report(self, error: BaseException) -> None:
        """Tell the others."""

    def cause_of(self, error: BaseException) -> RankFailedError | None:
        """Return who failed."""
        return None

    def leave(self) -> None:
        """Say goodbye."""

    def wait_for_others(self, timeout: float) -> bool:
        """Wait for the others."""
        return True
