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
