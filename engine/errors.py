"""Errors that callers may want to tell apart."""


class CheckpointError(ValueError):
    """Model files that cannot be loaded as they are; the message names the file, and what to do."""


class ConceptFileError(ValueError):
    """A concept file that is damaged, is no concept, or does not fit the model; the message says which."""


class NonFiniteError(RuntimeError):
    """A model produced NaN or infinity; the message names the stage."""


class OutOfMemoryError(RuntimeError):
    """The memory does not hold what was asked for; the message says what would fit."""


class UnknownArgumentError(ValueError, TypeError):
    """A keyword that a function does not have."""


class QueueFullError(RuntimeError):
    """A scheduler has as many requests waiting as it takes.

    Attributes:
        retry_after: seconds until there is likely to be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SchedulerClosedError(RuntimeError):
    """A scheduler takes no more requests."""


class DeadlineError(RuntimeError):
    """A request cannot be done by its deadline; the message says when it could."""
