"""The engine: the training loop, its events, the bus that carries them and the handle of a run.

Names are loaded when first used: events, bus and commands come without torch.
"""

from typing import TYPE_CHECKING

from offloop.engine.lazy_facade import lazy_facade

if TYPE_CHECKING:
    from offloop.engine.best import Best as Best
    from offloop.engine.bus.commands import Call as Call
    from offloop.engine.bus.commands import Command as Command
    from offloop.engine.bus.commands import Pause as Pause
    from offloop.engine.bus.commands import Resume as Resume
    from offloop.engine.bus.commands import SaveCheckpoint as SaveCheckpoint
    from offloop.engine.bus.commands import SetLearningRate as SetLearningRate
    from offloop.engine.bus.commands import Stop as Stop
    from offloop.engine.bus.commands import TagCheckpoint as TagCheckpoint
    from offloop.engine.bus.commands import Validate as Validate
    from offloop.engine.bus.subscription import Subscription as Subscription
    from offloop.engine.bus.subscription import SubscriptionStatistics as SubscriptionStatistics
    from offloop.engine.callback import Callback as Callback
    from offloop.engine.callback import TrainerParts as TrainerParts
    from offloop.engine.callback import decides as decides
    from offloop.engine.callback import in_step as in_step
    from offloop.engine.catalog.catalog import RunCatalog as RunCatalog
    from offloop.engine.catalog.export import Exported as Exported
    from offloop.engine.catalog.export import export_metrics as export_metrics
    from offloop.engine.catalog.labels import RunLabels as RunLabels
    from offloop.engine.catalog.labels import edit_labels as edit_labels
    from offloop.engine.catalog.labels import read_labels as read_labels
    from offloop.engine.catalog.record import RunRecord as RunRecord
    from offloop.engine.catalog.record import read_run as read_run
    from offloop.engine.catalog.run_fields import RUN_FIELDS as RUN_FIELDS
    from offloop.engine.catalog.run_fields import RunField as RunField
    from offloop.engine.catalog.run_fields import check_fields as check_fields
    from offloop.engine.catalog.run_fields import sort_runs as sort_runs
    from offloop.engine.catalog.run_fields import values_of as values_of
    from offloop.engine.catalog.run_filter import RunFilter as RunFilter
    from offloop.engine.catalog.summary import RunMetric as RunMetric
    from offloop.engine.catalog.tail import EventTail as EventTail
    from offloop.engine.catalog.tail import LogPlace as LogPlace
    from offloop.engine.checkpoint import CheckpointInfo as CheckpointInfo
    from offloop.engine.checkpoint import CheckpointReader as CheckpointReader
    from offloop.engine.checkpoint import Retention as Retention
    from offloop.engine.checkpoint.errors import CheckpointCorruptError as CheckpointCorruptError
    from offloop.engine.checkpoint.errors import CheckpointDeadlineError as CheckpointDeadlineError
    from offloop.engine.checkpoint.errors import CheckpointError as CheckpointError
    from offloop.engine.checkpoint.errors import CheckpointIncompatibleError as CheckpointIncompatibleError
    from offloop.engine.checkpoint.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from offloop.engine.checkpoint.errors import CheckpointReadError as CheckpointReadError
    from offloop.engine.checkpoint.errors import CheckpointWriteError as CheckpointWriteError
    from offloop.engine.checkpoint.errors import DiskFullError as DiskFullError
    from offloop.engine.checkpoint.errors import RemoteError as RemoteError
    from offloop.engine.checkpoint.errors import RunLockedError as RunLockedError
    from offloop.engine.checkpoint.errors import SnapshotBusyError as SnapshotBusyError
    from offloop.engine.checkpoint.errors import SnapshotMemoryError as SnapshotMemoryError
    from offloop.engine.checkpoint.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from offloop.engine.checkpoint.errors import UnserializableStateError as UnserializableStateError
    from offloop.engine.checkpoint.errors import WriterDiedError as WriterDiedError
    from offloop.engine.checkpoint.filesystem import replace_file as replace_file
    from offloop.engine.config import RemoteDirectory as RemoteDirectory
    from offloop.engine.config import TrainerConfig as TrainerConfig
    from offloop.engine.encoding import decode as decode
    from offloop.engine.encoding import encode as encode
    from offloop.engine.errors import BatchError as BatchError
    from offloop.engine.errors import BusClosedError as BusClosedError
    from offloop.engine.errors import CallbackProcessError as CallbackProcessError
    from offloop.engine.errors import CommandExpiredError as CommandExpiredError
    from offloop.engine.errors import CommandLostError as CommandLostError
    from offloop.engine.errors import CommandRejectedError as CommandRejectedError
    from offloop.engine.errors import ConfigError as ConfigError
    from offloop.engine.errors import DeadlockError as DeadlockError
    from offloop.engine.errors import EmptyLoaderError as EmptyLoaderError
    from offloop.engine.errors import EventError as EventError
    from offloop.engine.errors import EventLoopStalledError as EventLoopStalledError
    from offloop.engine.errors import LossError as LossError
    from offloop.engine.errors import MetricNotFoundError as MetricNotFoundError
    from offloop.engine.errors import ModelNotFoundError as ModelNotFoundError
    from offloop.engine.errors import OffloopError as OffloopError
    from offloop.engine.errors import Preempted as Preempted
    from offloop.engine.errors import RankFailedError as RankFailedError
    from offloop.engine.errors import RunEndedError as RunEndedError
    from offloop.engine.errors import RunLabelsChangedError as RunLabelsChangedError
    from offloop.engine.errors import RunLabelsError as RunLabelsError
    from offloop.engine.errors import RunNameTakenError as RunNameTakenError
    from offloop.engine.errors import RunNotFoundError as RunNotFoundError
    from offloop.engine.errors import RunsClosedError as RunsClosedError
    from offloop.engine.errors import SampleFileError as SampleFileError
    from offloop.engine.errors import SubscriberTooSlowError as SubscriberTooSlowError
    from offloop.engine.errors import TrainerBusyError as TrainerBusyError
    from offloop.engine.errors import WatchError as WatchError
    from offloop.engine.errors import WatchLostError as WatchLostError
    from offloop.engine.errors import WatchRefusedError as WatchRefusedError
    from offloop.engine.errors import WeightsError as WeightsError
    from offloop.engine.errors import WeightsMismatchError as WeightsMismatchError
    from offloop.engine.events import CallbackFailed as CallbackFailed
    from offloop.engine.events import CheckpointFailed as CheckpointFailed
    from offloop.engine.events import CheckpointSaved as CheckpointSaved
    from offloop.engine.events import CheckpointUploaded as CheckpointUploaded
    from offloop.engine.events import CommandApplied as CommandApplied
    from offloop.engine.events import DataBottleneck as DataBottleneck
    from offloop.engine.events import EpochEnd as EpochEnd
    from offloop.engine.events import EpochStart as EpochStart
    from offloop.engine.events import Evaluated as Evaluated
    from offloop.engine.events import Event as Event
    from offloop.engine.events import EventsDropped as EventsDropped
    from offloop.engine.events import LearningRateChanged as LearningRateChanged
    from offloop.engine.events import Metrics as Metrics
    from offloop.engine.events import Resumed as Resumed
    from offloop.engine.events import Sample as Sample
    from offloop.engine.events import Settings as Settings
    from offloop.engine.events import StateChanged as StateChanged
    from offloop.engine.events import StepEnd as StepEnd
    from offloop.engine.events import TrainEnd as TrainEnd
    from offloop.engine.events import TrainStart as TrainStart
    from offloop.engine.events import UnknownEvent as UnknownEvent
    from offloop.engine.events import UploadFailed as UploadFailed
    from offloop.engine.events import ValidationEnd as ValidationEnd
    from offloop.engine.events import ValidationStart as ValidationStart
    from offloop.engine.lazy_imports import first_use as first_use
    from offloop.engine.observers.event_log import EventLog as EventLog
    from offloop.engine.observers.event_log import read_attempts as read_attempts
    from offloop.engine.observers.event_log import read_events as read_events
    from offloop.engine.observers.line_file import LineFile as LineFile
    from offloop.engine.observers.observer import CallbackCosts as CallbackCosts
    from offloop.engine.replays.control import ReplayControl as ReplayControl
    from offloop.engine.replays.replay import Replay as Replay
    from offloop.engine.replays.replay import replay as replay
    from offloop.engine.replays.replay import replay_async as replay_async
    from offloop.engine.replays.replay_result import ReplayResult as ReplayResult
    from offloop.engine.replays.replayed_run import NotedCommand as NotedCommand
    from offloop.engine.replays.replayed_run import ReplayedRun as ReplayedRun
    from offloop.engine.result import RunResult as RunResult
    from offloop.engine.run import Run as Run
    from offloop.engine.run_handle import RunHandle as RunHandle
    from offloop.engine.runs import Runs as Runs
    from offloop.engine.samples.events import PictureSample as PictureSample
    from offloop.engine.samples.events import TableSample as TableSample
    from offloop.engine.samples.events import TextSample as TextSample
    from offloop.engine.samples.files import SampleFiles as SampleFiles
    from offloop.engine.samples.picture import Picture as Picture
    from offloop.engine.tools.tuning import BatchSizeSearch as BatchSizeSearch
    from offloop.engine.tools.tuning import BatchSizeTrial as BatchSizeTrial
    from offloop.engine.tools.tuning import LearningRateSearch as LearningRateSearch
    from offloop.engine.trainer import BaseTrainer as BaseTrainer
    from offloop.engine.trainer import Trainer as Trainer
    from offloop.engine.training.step_hooks import StepPoint as StepPoint
    from offloop.engine.weights.comparison import ModelComparison as ModelComparison
    from offloop.engine.weights.comparison import TensorDifference as TensorDifference
    from offloop.engine.weights.comparison import compare_models as compare_models
    from offloop.engine.weights.export import export_model as export_model
    from offloop.engine.weights.loading import load_model as load_model
    from offloop.engine.weights.registry import ModelRegistry as ModelRegistry
    from offloop.engine.weights.registry_reader import ModelVersion as ModelVersion

_NAMES = {
    "best": "Best",
    "bus.commands": "Call Command Pause Resume SaveCheckpoint SetLearningRate Stop TagCheckpoint Validate",
    "bus.subscription": "Subscription SubscriptionStatistics",
    "callback": "Callback TrainerParts decides in_step",
    "catalog.catalog": "RunCatalog",
    "catalog.export": "Exported export_metrics",
    "catalog.labels": "RunLabels edit_labels read_labels",
    "catalog.record": "RunRecord read_run",
    "catalog.run_fields": "RUN_FIELDS RunField check_fields sort_runs values_of",
    "catalog.run_filter": "RunFilter",
    "catalog.summary": "RunMetric",
    "catalog.tail": "EventTail LogPlace",
    "checkpoint": "CheckpointInfo CheckpointReader Retention",
    "checkpoint.errors": """
        CheckpointCorruptError CheckpointDeadlineError CheckpointError CheckpointIncompatibleError
        CheckpointNotFoundError CheckpointReadError CheckpointWriteError DiskFullError RemoteError
        RunLockedError SnapshotBusyError SnapshotMemoryError UnsafeCheckpointError UnserializableStateError
        WriterDiedError
    """,
    "checkpoint.filesystem": "replace_file",
    "config": "RemoteDirectory TrainerConfig",
    "encoding": "decode encode",
    "errors": """
        BatchError BusClosedError CallbackProcessError CommandExpiredError CommandLostError CommandRejectedError
        ConfigError DeadlockError EmptyLoaderError EventError EventLoopStalledError LossError
        MetricNotFoundError ModelNotFoundError OffloopError Preempted RankFailedError RunEndedError
        RunLabelsChangedError RunLabelsError RunNameTakenError RunNotFoundError RunsClosedError
        SampleFileError SubscriberTooSlowError TrainerBusyError WatchError WatchLostError WatchRefusedError WeightsError
        WeightsMismatchError
    """,
    "events": """
        CallbackFailed CheckpointFailed CheckpointSaved CheckpointUploaded CommandApplied DataBottleneck
        EpochEnd EpochStart Evaluated Event EventsDropped LearningRateChanged Metrics Resumed Sample Settings
        StateChanged StepEnd TrainEnd TrainStart UnknownEvent UploadFailed ValidationEnd ValidationStart
    """,
    "lazy_imports": "first_use",
    "observers.event_log": "EventLog read_attempts read_events",
    "observers.line_file": "LineFile",
    "observers.observer": "CallbackCosts",
    "replays.control": "ReplayControl",
    "replays.replay": "Replay replay replay_async",
    "replays.replay_result": "ReplayResult",
    "replays.replayed_run": "NotedCommand ReplayedRun",
    "result": "RunResult",
    "run": "Run",
    "run_handle": "RunHandle",
    "runs": "Runs",
    "samples.events": "PictureSample TableSample TextSample",
    "samples.files": "SampleFiles",
    "samples.picture": "Picture",
    "tools.tuning": "BatchSizeSearch BatchSizeTrial LearningRateSearch",
    "trainer": "BaseTrainer Trainer",
    "training.step_hooks": "StepPoint",
    "weights.comparison": "ModelComparison TensorDifference compare_models",
    "weights.export": "export_model",
    "weights.loading": "load_model",
    "weights.registry": "ModelRegistry",
    "weights.registry_reader": "ModelVersion",
}
__all__, __getattr__, __dir__ = lazy_facade(__name__, _NAMES)
