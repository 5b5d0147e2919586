"""Offloop trains a PyTorch model in a thread of its own and turns the run into an ordered stream of typed events.

    from offloop import EarlyStopping, ModelCheckpoint, Trainer

    trainer = Trainer(model, optimizer, loss=loss, callbacks=[ModelCheckpoint("val_loss")])
    result = trainer.train(train_loader, val_loader, epochs=10)

The names that most programs need are here. `offloop.engine`, `offloop.callbacks` and `offloop.dashboard` hold the
rest, and `offloop.engine.testing` helps to test callbacks. `python -m offloop --help` lists the commands.

Names are loaded when first used: `import offloop` itself loads neither torch nor msgspec nor anyio.
"""

import sys

if sys.platform == "win32":
    raise ImportError("offloop runs on Linux and macOS; on Windows, install it in WSL")

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a source tree without symbolic links (an unpacked sdist) the packages are next to this folder.
if not (Path(__file__).parent / "engine").exists():
    __path__.append(str(Path(__file__).parent.parent))

from offloop.engine.lazy_facade import lazy_facade

if TYPE_CHECKING:
    from offloop.callbacks import Above as Above
    from offloop.callbacks import Alert as Alert
    from offloop.callbacks import Alerts as Alerts
    from offloop.callbacks import Below as Below
    from offloop.callbacks import CheckpointEvaluator as CheckpointEvaluator
    from offloop.callbacks import EarlyStopping as EarlyStopping
    from offloop.callbacks import Failed as Failed
    from offloop.callbacks import GpuUsage as GpuUsage
    from offloop.callbacks import GradientMonitor as GradientMonitor
    from offloop.callbacks import GradientStatistics as GradientStatistics
    from offloop.callbacks import LayersMeasured as LayersMeasured
    from offloop.callbacks import LayerStatistics as LayerStatistics
    from offloop.callbacks import LearningCurves as LearningCurves
    from offloop.callbacks import LearningRateScheduler as LearningRateScheduler
    from offloop.callbacks import MetricLogger as MetricLogger
    from offloop.callbacks import MLflowLogger as MLflowLogger
    from offloop.callbacks import ModelCheckpoint as ModelCheckpoint
    from offloop.callbacks import NonFinite as NonFinite
    from offloop.callbacks import Profiler as Profiler
    from offloop.callbacks import ProfileWritten as ProfileWritten
    from offloop.callbacks import ProgressBar as ProgressBar
    from offloop.callbacks import ResourceMonitor as ResourceMonitor
    from offloop.callbacks import ResourceUsage as ResourceUsage
    from offloop.callbacks import Rule as Rule
    from offloop.callbacks import Spike as Spike
    from offloop.callbacks import Stalled as Stalled
    from offloop.callbacks import TensorBoardLogger as TensorBoardLogger
    from offloop.callbacks import WandbLogger as WandbLogger
    from offloop.callbacks import WeightAverage as WeightAverage
    from offloop.dashboard import Dashboard as Dashboard
    from offloop.dashboard import MetricCurve as MetricCurve
    from offloop.dashboard import SavedPage as SavedPage
    from offloop.dashboard import Watch as Watch
    from offloop.dashboard import connect as connect
    from offloop.dashboard import export_html as export_html
    from offloop.engine import BaseTrainer as BaseTrainer
    from offloop.engine import BatchError as BatchError
    from offloop.engine import Best as Best
    from offloop.engine import BusClosedError as BusClosedError
    from offloop.engine import Callback as Callback
    from offloop.engine import CallbackCosts as CallbackCosts
    from offloop.engine import CallbackFailed as CallbackFailed
    from offloop.engine import CallbackProcessError as CallbackProcessError
    from offloop.engine import CheckpointError as CheckpointError
    from offloop.engine import CheckpointFailed as CheckpointFailed
    from offloop.engine import CheckpointNotFoundError as CheckpointNotFoundError
    from offloop.engine import CheckpointSaved as CheckpointSaved
    from offloop.engine import CheckpointUploaded as CheckpointUploaded
    from offloop.engine import CommandApplied as CommandApplied
    from offloop.engine import CommandExpiredError as CommandExpiredError
    from offloop.engine import CommandLostError as CommandLostError
    from offloop.engine import CommandRejectedError as CommandRejectedError
    from offloop.engine import ConfigError as ConfigError
    from offloop.engine import DataBottleneck as DataBottleneck
    from offloop.engine import DeadlockError as DeadlockError
    from offloop.engine import EmptyLoaderError as EmptyLoaderError
    from offloop.engine import EpochEnd as EpochEnd
    from offloop.engine import EpochStart as EpochStart
    from offloop.engine import Evaluated as Evaluated
    from offloop.engine import Event as Event
    from offloop.engine import EventError as EventError
    from offloop.engine import EventLoopStalledError as EventLoopStalledError
    from offloop.engine import EventsDropped as EventsDropped
    from offloop.engine import LearningRateChanged as LearningRateChanged
    from offloop.engine import LossError as LossError
    from offloop.engine import MetricNotFoundError as MetricNotFoundError
    from offloop.engine import Metrics as Metrics
    from offloop.engine import ModelNotFoundError as ModelNotFoundError
    from offloop.engine import ModelRegistry as ModelRegistry
    from offloop.engine import ModelVersion as ModelVersion
    from offloop.engine import NotedCommand as NotedCommand
    from offloop.engine import OffloopError as OffloopError
    from offloop.engine import Picture as Picture
    from offloop.engine import PictureSample as PictureSample
    from offloop.engine import Preempted as Preempted
    from offloop.engine import RankFailedError as RankFailedError
    from offloop.engine import RemoteDirectory as RemoteDirectory
    from offloop.engine import Replay as Replay
    from offloop.engine import ReplayedRun as ReplayedRun
    from offloop.engine import ReplayResult as ReplayResult
    from offloop.engine import Resumed as Resumed
    from offloop.engine import Retention as Retention
    from offloop.engine import Run as Run
    from offloop.engine import RunEndedError as RunEndedError
    from offloop.engine import RunHandle as RunHandle
    from offloop.engine import RunNameTakenError as RunNameTakenError
    from offloop.engine import RunNotFoundError as RunNotFoundError
    from offloop.engine import RunResult as RunResult
    from offloop.engine import Runs as Runs
    from offloop.engine import RunsClosedError as RunsClosedError
    from offloop.engine import Sample as Sample
    from offloop.engine import SampleFileError as SampleFileError
    from offloop.engine import SampleFiles as SampleFiles
    from offloop.engine import Settings as Settings
    from offloop.engine import StateChanged as StateChanged
    from offloop.engine import StepEnd as StepEnd
    from offloop.engine import StepPoint as StepPoint
    from offloop.engine import SubscriberTooSlowError as SubscriberTooSlowError
    from offloop.engine import TableSample as TableSample
    from offloop.engine import TextSample as TextSample
    from offloop.engine import TrainEnd as TrainEnd
    from offloop.engine import Trainer as Trainer
    from offloop.engine import TrainerBusyError as TrainerBusyError
    from offloop.engine import TrainerConfig as TrainerConfig
    from offloop.engine import TrainStart as TrainStart
    from offloop.engine import UploadFailed as UploadFailed
    from offloop.engine import ValidationEnd as ValidationEnd
    from offloop.engine import ValidationStart as ValidationStart
    from offloop.engine import WatchError as WatchError
    from offloop.engine import WatchLostError as WatchLostError
    from offloop.engine import WatchRefusedError as WatchRefusedError
    from offloop.engine import WeightsError as WeightsError
    from offloop.engine import WeightsMismatchError as WeightsMismatchError
    from offloop.engine import compare_models as compare_models
    from offloop.engine import decides as decides
    from offloop.engine import decode as decode
    from offloop.engine import encode as encode
    from offloop.engine import export_model as export_model
    from offloop.engine import in_step as in_step
    from offloop.engine import load_model as load_model
    from offloop.engine import read_events as read_events
    from offloop.engine import replay as replay
    from offloop.engine import replay_async as replay_async

_NAMES = {
    "callbacks": """
        Above Alert Alerts Below CheckpointEvaluator EarlyStopping Failed GpuUsage GradientMonitor GradientStatistics
        LayerStatistics LayersMeasured LearningCurves LearningRateScheduler MLflowLogger MetricLogger
        ModelCheckpoint NonFinite ProfileWritten Profiler ProgressBar ResourceMonitor ResourceUsage Rule
        Spike Stalled TensorBoardLogger WandbLogger WeightAverage
    """,
    "dashboard": "Dashboard MetricCurve SavedPage Watch connect export_html",
    "engine": """
        BaseTrainer BatchError Best BusClosedError Callback CallbackCosts CallbackFailed CallbackProcessError
        CheckpointError CheckpointFailed CheckpointNotFoundError CheckpointSaved CheckpointUploaded
        CommandApplied CommandExpiredError CommandLostError CommandRejectedError ConfigError DataBottleneck
        DeadlockError EmptyLoaderError EpochEnd EpochStart Evaluated Event EventError EventLoopStalledError
        EventsDropped LearningRateChanged LossError MetricNotFoundError Metrics ModelNotFoundError
        ModelRegistry ModelVersion NotedCommand OffloopError Picture PictureSample Preempted RankFailedError
        RemoteDirectory Replay ReplayResult ReplayedRun Resumed Retention Run RunEndedError RunHandle
        RunNameTakenError RunNotFoundError RunResult Runs RunsClosedError Sample SampleFileError SampleFiles
        Settings StateChanged StepEnd StepPoint SubscriberTooSlowError TableSample TextSample TrainEnd
        TrainStart Trainer TrainerBusyError TrainerConfig UploadFailed ValidationEnd ValidationStart
        WatchError WatchLostError WatchRefusedError WeightsError WeightsMismatchError compare_models decides
        decode encode export_model in_step load_model read_events replay replay_async
    """,
}
_PACKAGES = ("callbacks", "cli", "dashboard", "engine")

# `__version__` is listed for `dir`; `__getattr__` below answers it.
__all__, _load, __dir__ = lazy_facade(__name__, _NAMES, (*_PACKAGES, "__version__"))


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _load(name)
    from importlib import metadata

    return metadata.version("offloop")
