"""Every error that a user of moe_jax can cause, in one place.

All are `ValueError`s: the input was wrong, nothing was changed, and the message says what was expected and what to do.
"""


class MoEJaxError(ValueError):
    """Base of the errors below; the command line prints it without a traceback."""


class ConfigError(MoEJaxError):
    """A model description that makes no sense, or that this version cannot compute."""


class PlacementError(MoEJaxError):
    """A mesh or placement that does not exist, that does not fit the model, or that a layer is called outside of."""


class CheckpointError(MoEJaxError):
    """A checkpoint directory that is missing, damaged, or does not match its own config."""


class RequestError(MoEJaxError):
    """A prompt or sampling parameter that cannot be served."""


class ProcessGroupError(MoEJaxError):
    """Processes that cannot be joined, or that were started or are used otherwise than the others."""


class ReductionError(MoEJaxError):
    """A sum over devices done twice, never, or on a value that is no partial sum; raised while tracing."""
