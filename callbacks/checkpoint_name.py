"""CheckpointName: names of checkpoints, formatted from their position and their metrics."""

import math
import string
from typing import Final

from offloop.engine import CheckpointInfo, ConfigError, EpochEnd, ValidationEnd

POSITION: Final = ("epoch", "step", "batch", "attempt")


class CheckpointName:
    """A pattern in Python's format language, like `"epoch={epoch}-val_loss={val_loss:.3f}"`."""

    def __init__(self, pattern: str) -> None:
        """Check the pattern.

        Raises:
            ConfigError: It has an unknown key, or does not make the name of a directory.
        """
        legal = f"{{{'}, {'.join(POSITION)}}}, and metrics like {{val_loss:.3f}} or {{train_loss:.3f}}"
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"filename must be a pattern like 'epoch={{epoch}}', got {pattern!r}")
        self.pattern = pattern
        self.metrics: list[str] = []
        try:
            fields = [field for field in string.Formatter().parse(pattern) if field[1] is not None]
        except ValueError as error:
            raise ConfigError(
                f"filename {pattern!r} is no pattern: {error}; its keys can be {legal}"
            ) from None
        for _, key, format_spec, conversion in fields:
            assert key is not None
            if key not in POSITION and not (
                key.startswith(("train_", "val_", "eval_")) and key.isidentifier()
            ):
                raise ConfigError(f"filename has the unknown key {{{key}}}; legal are {legal}")
            if conversion is not None:
                raise ConfigError(f"filename has a conversion, {{{key}!{conversion}}}: leave it out")
            try:
                format(0 if key in POSITION else 0.5, format_spec or "")
            except ValueError as error:
                raise ConfigError(f"filename cannot format {{{key}:{format_spec}}}: {error}") from None
            if key not in POSITION:
                self.metrics.append(key)
        example = self.format({key: 0 for key in POSITION}, dict.fromkeys(self.metrics, 0.5))
        if set(example) & set("/\\\0") or example.startswith(".") or len(example.encode()) > 200:
            raise ConfigError(
                f"filename must make the name of one directory, without slashes, a dot at the beginning or more than "
                f"200 bytes; {pattern!r} makes {example!r}; where it is put is save_dir"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointName) and self.pattern == other.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __call__(self, info: CheckpointInfo) -> str:
        """Return the name of a checkpoint; a metric that was not computed at its step is `nan`."""
        return self.format({key: getattr(info.manifest, key) for key in POSITION}, info.metrics)

    def format(self, position: dict[str, int], metrics: dict[str, float]) -> str:
        """Return the pattern with values filled in."""
        return self.pattern.format(**position, **{key: metrics.get(key, math.nan) for key in self.metrics})

    def check(self, event: ValidationEnd | EpochEnd) -> None:
        """Raise if the event lacks a metric of the pattern that it should have."""
        prefix = "val_" if isinstance(event, ValidationEnd) else "train_"
        for key in self.metrics:
            if key.startswith(prefix):
                event.metrics[key]
