"""Samples of a replay: those of the recorded run are read from its directory, new ones go to that of the replay."""

import logging
from pathlib import Path

from offloop.engine.errors import SampleFileError
from offloop.engine.events import Event
from offloop.engine.samples.content import file_name, read_file
from offloop.engine.samples.events import PictureSample, TableSample, TextSample, pictures_of
from offloop.engine.samples.files import SampleFiles
from offloop.engine.samples.picture import Picture

logger = logging.getLogger("offloop")


class ReplayedSamples(SampleFiles):
    """Contents of the samples of a recorded run, and of those that callbacks publish in its replay. Any thread."""

    def __init__(self, directory: Path | None, recorded: Path) -> None:
        """Keep nothing yet.

        Args:
            directory: Where callbacks write; None if they do not.
            recorded: Directory of the recorded run, in which nothing is written.
        """
        super().__init__(directory)
        self._writes = directory is not None
        self._recorded = recorded

    def read(self, sample: Picture | TextSample) -> bytes:
        try:
            return super().read(sample)
        except SampleFileError:
            return self._read_recorded(sample)

    def take_over(self, event: Event) -> None:
        """Have the event log of the replay write the contents of a recorded sample, too. Blocks."""
        if not self._writes:
            return
        if not isinstance(event, TextSample | PictureSample | TableSample):
            return
        for each in (event,) if isinstance(event, TextSample) else pictures_of(event):
            if each.sha256:
                try:
                    data = self._read_recorded(each)
                except SampleFileError as error:
                    logger.warning("a sample of the recorded run cannot be read: %s", error)
                else:
                    self._add(file_name(each.sha256, each.media_type), data)

    def _read_recorded(self, sample: Picture | TextSample) -> bytes:
        return read_file(self._recorded, sample.sha256, sample.media_type, sample.size)
