"""TensorBoardLogger: log a run to TensorBoard's event files."""

import importlib
import io
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offloop.callbacks.alerts import Alert
from offloop.callbacks.tracking import (
    expect_package,
    plain_hyperparameters,
    values_to_plot,
)
from offloop.callbacks.value_logger import Measured, ValueLogger
from offloop.engine import (
    PictureSample,
    RunHandle,
    SampleFileError,
    SampleFiles,
    TextSample,
    TrainEnd,
    TrainStart,
    first_use,
    replace_file,
)
from offloop.engine.argument_hints import explains_arguments

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


logger = logging.getLogger("offloop")


class TensorBoardLogger(ValueLogger):
    """Writes scalars, hyperparameters, alerts, texts and pictures for TensorBoard: `tensorboard --logdir runs`.

    Scalars keep their names, over optimizer steps: `loss`, `lr`, `grad_norm` and logged values of steps, `val_...` of
    validations, `train_...` of epochs, `epoch`. TensorBoard shows hyperparameters and status in its HPARAMS tab, and
    alerts, `TextSample` and `PictureSample` as texts and images. A resumed attempt continues in the same directory;
    points after its checkpoint are cut from the files, and an open TensorBoard drops them.

    By default the files are in the run's directory, so TensorBoard names the run by its id. A killed process loses at
    most a second of points. It runs in the callback's worker thread; training never waits for it.

    Requires tensorboard: `pip install 'offloop[tensorboard]'`.
    """

    @explains_arguments()
    def __init__(
        self,
        *,
        log_dir: "str | Path | None" = None,
        every_seconds: float | None = None,
        every_n_steps: int | None = None,
        runs_in: Literal["here", "process"] | None = None,
    ) -> None:
        """Choose the directory and the interval of steps.

        Args:
            log_dir: Directory in which each run gets one named by its id. None: the run's own directory.
            every_seconds: Seconds between logged steps, above 0. None: 1.0, unless `every_n_steps` is given.
            every_n_steps: Steps between logged steps, at least 1.
            runs_in: `"here"` logs in a thread of this process, `"process"` in a process of its own. None: `"here"`.

        Raises:
            ModuleNotFoundError: tensorboard is not installed.
            ConfigError: A value is out of range.
        """
        expect_package("tensorboard", "tensorboard")
        # Import here rather than during the run: it holds the interpreter for a second.
        with first_use("tensorboard"):
            for module in ("backend.event_processing.event_file_loader", "plugins.hparams.metadata"):
                importlib.import_module(f"tensorboard.{module}")
            self._writer_class: type[SummaryWriter] = importlib.import_module(
                "torch.utils.tensorboard"
            ).SummaryWriter
        self.log_dir = None if log_dir is None else Path(log_dir).expanduser().absolute()
        self.needs_run_dir = log_dir is None  # type: ignore[misc]  # of this instance
        super().__init__(every_seconds=every_seconds, every_n_steps=every_n_steps, runs_in=runs_in)

    def reset(self) -> None:
        super().reset()
        self._writer: SummaryWriter | None = None
        self._has_unwritten = False
        self._status = "cancelled"
        # In a process of its own a picture may be published before its file is written.
        self._samples: list[tuple[TextSample | PictureSample, RunHandle]] = []

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        directory = run.dir if self.log_dir is None else self.log_dir / run.id
        assert directory is not None  # needs_run_dir
        if event.attempt:
            cut_event_files(directory, event)
        self._writer = self._writer_class(
            str(directory),
            purge_step=event.step + 1 if event.attempt else None,
            filename_suffix=f".{event.attempt}",
        )
        self._add_session_start(event, plain_hyperparameters(event))

    def write(self, event: Measured, values: Mapping[str, float]) -> None:
        # None if opening it failed, which was reported at the start.
        if self._writer is None:
            return
        for name, value in values_to_plot(event, values).items():
            self._writer.add_scalar(name, value, event.step, walltime=event.time)
        self._has_unwritten = True

    def on_alert(self, event: Alert, run: RunHandle) -> None:
        if self._writer is None:
            return
        self._writer.add_text("alerts", f"{event.rule}: {event.message}", event.step, walltime=event.time)
        self._has_unwritten = True

    def on_text_sample(self, event: TextSample, run: RunHandle) -> None:
        self._samples.append((event, run))

    def on_picture_sample(self, event: PictureSample, run: RunHandle) -> None:
        self._samples.append((event, run))

    def events_handled(self) -> None:
        self._add_samples()
        if self._has_unwritten and self._writer is not None:
            self._has_unwritten = False
            self._writer.flush()

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        self._status = event.status

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self.write_latest_step()
            self._add_samples()
            if self._samples:
                logger.warning(
                    "%d texts and pictures are missing: their files cannot be read", len(self._samples)
                )
            self._add_session_end()
        finally:
            self._writer.close()

    def _add_samples(self) -> None:
        """Write the texts and pictures whose content can be read by now."""
        waiting, self._samples = self._samples, []
        for event, run in waiting if self._writer is not None else ():
            try:
                self._add_sample(event, run)
            except SampleFileError:
                self._samples.append((event, run))

    def _add_sample(self, event: TextSample | PictureSample, run: RunHandle) -> None:
        assert self._writer is not None
        content = event.picture if isinstance(event, PictureSample) else event
        # A handle in another process has none; the files are in the same place.
        files = getattr(run, "samples", None) or SampleFiles(run.dir)
        data: bytes = files.read(content)
        if isinstance(content, TextSample):
            self._writer.add_text(event.key, data.decode(), event.step, walltime=event.time)
        elif self._writer.file_writer is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(width=content.width, height=content.height, encoded_image_string=data)
            summary = Summary(value=[Summary.Value(tag=event.key, image=image)])
            self._writer.file_writer.add_summary(summary, event.step, walltime=event.time)
        self._has_unwritten = True

    def _add_session_start(self, event: TrainStart, hyperparameters: Mapping[str, Any]) -> None:
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        info = plugin_data_pb2.SessionStartInfo(start_time_secs=event.time)
        for name, value in hyperparameters.items():
            if isinstance(value, bool):
                info.hparams[name].bool_value = value
            elif isinstance(value, str):
                info.hparams[name].string_value = value
            else:
                info.hparams[name].number_value = value
        self._add_session(metadata.SESSION_START_INFO_TAG, session_start_info=info)

    def _add_session_end(self) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        ended_well = self._status in ("completed", "stopped")
        status = api_pb2.STATUS_SUCCESS if ended_well else api_pb2.STATUS_FAILURE
        info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        self._add_session(metadata.SESSION_END_INFO_TAG, session_end_info=info)

    def _add_session(self, tag: str, **info: Any) -> None:
        """Write an entry for the HPARAMS tab."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        assert self._writer is not None and self._writer.file_writer is not None
        content = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **info)
        value = Summary.Value(
            tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR
        )
        self._writer.file_writer.add_summary(Summary(value=[value]))
        self._writer.flush()


def cut_event_files(directory: Path, start: TrainStart) -> None:
    """Cut from TensorBoard's files what came after the checkpoint that is resumed. Each file is replaced whole.

    Each attempt has its own file, whose name ends with the attempt's number.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in sorted(directory.glob("events.out.tfevents.*")):
        attempt = path.suffix[1:]
        if start.resumed_attempt is None or not attempt.isdecimal() or int(attempt) > start.resumed_attempt:
            path.unlink()
            continue
        if int(attempt) < start.resumed_attempt or start.resumed_at is None:
            continue
        records = list(RawEventFileLoader(str(path)).Load())
        # The first record is the file's version, written when the file was created.
        kept = [each for each in records if Event.FromString(each).wall_time <= start.resumed_at]
        if len(kept) < len(records):
            content = io.BytesIO()
            writer = RecordWriter(content)
            for each in kept:
                writer.write(each)
            replace_file(path, content.getvalue())
