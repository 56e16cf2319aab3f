"""A strict reader of a Hugging Face `config.json`: every field is used, known to change nothing, or reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from moe_jax.errors import ConfigError

T = TypeVar("T", int, float, bool)
C = TypeVar("C")

BOOKKEEPING = frozenset(
    [
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "ep_size",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Fields that do not change what a decoder computes: records, training settings, token ids that sampling reads
elsewhere, layers after the last that guess further tokens."""

TEXT = "text_config"
"""The object that describes the part for text of a model that takes pictures too."""

_REQUIRED: Any = object()


class Fields:
    """The fields of one config file. Problems are collected; `read` raises them all at once."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw
        self._seen = {name for name in raw if name in BOOKKEEPING or name.startswith("_")}
        self._problems: list[str] = []
        self._prefix = ""
        self._inner: dict[str, Fields] = {}

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._raw.get(name) is not None

    def take(self, name: str, kind: type[T], default: T = _REQUIRED) -> T:
        """The field as a bool or a positive int or float. Another kind, or none and no default, is a problem."""
        value = self.any(name, default)
        if value is _REQUIRED:
            self.problem(f"{name} is missing")
            return kind(1)
        return self._checked(name, value, kind)

    def take_optional(self, name: str, kind: type[T]) -> T | None:
        """As `take`; `None` where the field is missing or null."""
        return self.take(name, kind) if self.has(name) else self.any(name, None)

    def take_list(self, name: str, kind: type) -> list[Any]:
        """A field that lists values of one kind (whole numbers are floats too); empty where it is missing or null."""
        kinds = (int, float) if kind is float else (kind,)
        value = self.any(name, [])
        if isinstance(value, list) and all(type(item) in kinds for item in value):
            return value
        self.problem(f"{name} must be a list of {kind.__name__}, got {value!r}")
        return []

    def any(self, name: str, default: Any) -> Any:
        """The field, whatever it is; `default` where it is missing or null."""
        self._seen.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def expect(self, name: str, *supported: Any) -> None:
        """A field of which only these values (or its absence) can be computed here."""
        value = self.any(name, supported[0])
        if value not in supported:
            self.problem(f"{name}={value!r} is not supported (only {', '.join(map(repr, supported))})")

    def rename(self, other: str, name: str) -> None:
        """Read a field by `name` in files that call it by the other one."""
        if other in self._raw:
            if self.has(name) and self._raw[other] != self._raw[name]:
                self.problem(f"{other} and {name} are two names of one thing: remove one")
            self._raw = {name: self._raw[other], **self._raw}
            self._seen.add(other)

    def problem(self, text: str) -> None:
        self._problems.append(self._prefix + text)

    def inner(self, name: str) -> Fields:
        """An object within this one, read as strictly; its problems and fields are told with its name before them."""
        if name not in self._inner:
            value = self.any(name, {})
            if not isinstance(value, dict):
                self.problem(f"{name} must be an object, got {value!r}")
                value = {}
            inner = self._inner[name] = Fields(value)
            inner._prefix, inner._problems = f"{self._prefix}{name}.", self._problems
        return self._inner[name]

    def _checked(self, name: str, value: Any, kind: type[T]) -> T:
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (int, kind)):
            self.problem(f"{name} must be of type {kind.__name__}, got {value!r}")
        elif kind is not bool and not 0 < value < math.inf:
            self.problem(f"{name} must be positive and finite, got {value}")
        else:
            return kind(value)
        return kind(1)

    def read(self, reader: Callable[[Fields], C]) -> C:
        """What `reader` makes of the fields.

        Raises:
          ConfigError: naming every problem, and every field that the reader did not ask for.
        """
        try:
            config = reader(self)
        except ConfigError as error:
            raise ConfigError("config.json: " + "; ".join(self._problems or [str(error)])) from error
        if unknown := sorted(self._unknown()):
            self._problems.append(
                f"fields not understood, which may change the computation: {', '.join(unknown)} "
                "(remove those from config.json that you know change nothing)"
            )
        if self._problems:
            raise ConfigError("config.json: " + "; ".join(self._problems))
        return config

    def _unknown(self) -> Iterator[str]:
        yield from (self._prefix + name for name in set(self._raw) - self._seen)
        for inner in self._inner.values():
            yield from inner._unknown()
