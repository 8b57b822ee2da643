"""The errors a user can meet; each also inherits the builtin that fits, so callers need not import this module.

The command line maps them to exit codes: `UsageError` and its children to 2 (nothing touched), all others to 1.
"""

from alpacache.masking import masked


class AlpacacheError(Exception):
    """Base of every error this package raises on purpose; secrets in its texts are masked."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in args))


class UsageError(AlpacacheError, ValueError):
    """A command, option, config or path that cannot work; nothing was changed."""


class CheckpointError(UsageError):
    """A model checkpoint that is absent, incomplete, or of other shapes than its config says."""


class SourceError(UsageError):
    """A data source as a whole cannot be read (no such directory, gated, offline)."""


class BadClipError(AlpacacheError, ValueError):
    """One clip or sample cannot be used; the run quarantines it and goes on.

    `kind` is a short stable word for counting (`missing_camera`, `missing_clip`, `missing_poses`, `short_clip`,
    `undecodable_video`, `not_finite`, `pose_jump`, `time_order`, `wrong_frame`, `wrong_shape`, `unsafe_path`,
    `unsafe_size`, `bad_route`); the message tells a person what is wrong, where, and what would help.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DataError(AlpacacheError, OSError):
    """Stored data cannot be read (damaged, truncated, gone)."""


class NonFiniteError(AlpacacheError, ArithmeticError):
    """Numbers of a model that are not finite: losses of several steps in a row, weights, predicted paths."""


class DeviceMemoryError(AlpacacheError, MemoryError):
    """The GPU ran out of memory although the plan fitted."""


class LostProcessError(AlpacacheError):
    """Another process of a run on several GPUs has ended; its own message says why."""


class ProcessGroupError(AlpacacheError, RuntimeError):
    """The processes of a run could not communicate, and none of them is known to have ended."""


class InterruptedRunError(AlpacacheError):
    """A run stopped on SIGINT or SIGTERM; everything committed is kept and the same command goes on."""
