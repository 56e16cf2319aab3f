"""Errors that users of moe_jax can cause.

All are `ValueError`s: the input was wrong, nothing was changed, and the message says what was expected and what to do.
"""


class MoEJaxError(ValueError):
    """Base class of all errors of moe_jax. The command line prints them without a traceback."""


class ConfigError(MoEJaxError):
    """Invalid or unsupported model configuration."""


class PlacementError(MoEJaxError):
    """Unknown mesh or placement, one that does not fit the model, or a layer called outside its placement."""


class CheckpointError(MoEJaxError):
    """Missing or damaged checkpoint directory, or one that does not match its own config."""


class RequestError(MoEJaxError):
    """Invalid prompt or sampling parameter, or a request that cannot be served."""


class CapacityError(RequestError):
    """The devices have too little memory for a sequence."""


class ProcessGroupError(MoEJaxError):
    """Processes that cannot join a group, or that differ in how they were started or are used."""


class ReductionError(MoEJaxError):
    """Sum over devices done twice, never, or on a value that is not a partial sum; raised while tracing."""
