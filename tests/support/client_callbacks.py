"""Callbacks driven by a program that watches the run over its live page."""

import inspect
import threading
from typing import Any

import anyio
from run_handles import InPlace

from offloop.dashboard import Dashboard, Watch, connect
from offloop.engine import Callback, Event, ReplayedRun, Run, TrainStart, decides


class AtClient(Dashboard):
    """A page, and a program that watches it: the program handles events as a run lets a callback handle them."""

    def __init__(self, callback: InPlace) -> None:
        super().__init__(port=0, quiet=True)
        self.callback = callback
        self.errors: list[BaseException] = []
        self._client = threading.Thread(target=self._be_client, name="client")

    @decides
    def on_train_start(self, event: TrainStart, run: Run | ReplayedRun) -> None:
        super().on_train_start(event, run)
        self._client.start()

    def close(self) -> None:
        super().close()
        self._client.join()

    def _be_client(self) -> None:
        try:
            anyio.run(self._watch)
        except BaseException as error:
            self.errors.append(error)

    async def _watch(self) -> None:
        async with connect(self.url) as watch:
            async for event in watch.events():
                await self._handle(event, watch)
        closing: Any = self.callback.close()
        if inspect.isawaitable(closing):
            await closing

    async def _handle(self, event: Event, watch: Watch) -> None:
        handler: Any = getattr(self.callback, event.handler_name, None)
        if inspect.iscoroutinefunction(handler):
            await handler(event, watch)
        elif handler is not None:
            await anyio.to_thread.run_sync(handler, event, watch)


def placed(callback: InPlace, place: str) -> Callback:
    """Return what a run takes so that a callback has its run in a place."""
    return AtClient(callback) if place == "client" else callback
