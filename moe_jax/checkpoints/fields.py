"""A strict reader of a Hugging Face `config.json`: each field is used, ignored on purpose, or reported as an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as shortened
from typing import Any, TypeVar

from moe_jax.errors import ConfigError

T = TypeVar("T", int, float, bool)
C = TypeVar("C")

BOOKKEEPING = frozenset(
    [
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "ep_size",
        "expert_dropout",
        "finetuning_task",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_moe",
        "label2id",
        "model_type",
        "name_or_path",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "sep_token_id",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_grouped_mm",
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "remove_invalid_values",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ]
)
"""Fields that do not change what a decoder computes: records, training settings, token ids and settings of generation
that sampling reads elsewhere, the number of multi-token-prediction (MTP) layers."""

TEXT = "text_config"
"""Field of a multimodal config that holds the config of its language model."""

LAYERS, MAX_LAYERS = ("num_hidden_layers", "num_layers", "n_layers"), 10_000
"""Names of the number of layers, and its maximum."""
MAX_INT = 2**31 - 1
"""Maximum of other sizes."""
MIN_FLOAT, MAX_FLOAT = 1e-37, 1e38
"""Bounds of numbers, which float32 can hold."""

_REQUIRED: Any = object()


class _Problems(list[str]):
    """Problems of one config file, in the order in which they were found."""

    has_replaced = False
    """True once a wrong value was replaced: what later checks find may follow from the replacement."""


class Fields:
    """The fields of one config file, or of one object within it. `read` raises all problems at once."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw
        self._seen = {name for name in raw if name in BOOKKEEPING or name.startswith("_")}
        self._problems = _Problems()
        self._prefix = ""
        self._inner: dict[str, Fields] = {}

    def has(self, name: str) -> bool:
        """True if the field is present and not null."""
        return self._raw.get(name) is not None

    def take(self, name: str, kind: type[T], default: T = _REQUIRED) -> T:
        """Return the field as a bool, or as a positive int or float.

        A value of another type is a problem; so is a missing field without a default.
        """
        value = self.get(name, default)
        if value is _REQUIRED:
            return self._replaced(f"{name} is missing", kind(1))
        return self._checked(name, value, kind)

    def take_optional(self, name: str, kind: type[T]) -> T | None:
        """Return the field like `take`, or `None` if it is missing or null."""
        return self.take(name, kind) if self.has(name) else self.get(name, None)

    def take_list(self, name: str, kind: type) -> list[Any]:
        """Return a field that is a list of one type, or `[]` if it is missing or null. An int counts as a float."""
        kinds = (int, float) if kind is float else (kind,)
        value = self.get(name, [])
        if isinstance(value, list) and all(type(item) in kinds for item in value):
            return value
        return self._replaced(f"{name} must be a list of {kind.__name__}, got {shortened(value)}", [])

    def get(self, name: str, default: Any) -> Any:
        """Return the field unchecked, or `default` if it is missing or null."""
        self._seen.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def ignore(self, *names: str) -> None:
        """Accept fields with any value: they do not change what the decoder computes."""
        self._seen.update(names)

    def ignore_all(self) -> None:
        """Accept all fields, for a reader that has found why the whole object is not supported."""
        self._seen.update(self._raw)

    @property
    def names(self) -> list[str]:
        """Names of the fields that are present and not null."""
        return [name for name in self._raw if self.has(name)]

    def expect_all(self, supported: Mapping[str, Any]) -> None:
        """Require each of these fields to have the given value, or to be missing or null."""
        for name, value in supported.items():
            self.expect(name, value)

    def expect(self, name: str, *supported: Any) -> None:
        """Require a field to have one of the supported values, or to be missing or null."""
        value = self.get(name, supported[0])
        if value not in supported:
            self._report(f"{name}={shortened(value)} is not supported (only {', '.join(map(repr, supported))})")

    def rename(self, alias: str, name: str) -> None:
        """Accept `alias` as another name of the field `name`."""
        if alias in self._raw:
            if self.has(name) and self._raw[alias] != self._raw[name]:
                self._report(f"{alias} and {name} are two names of one thing: remove one")
            self._raw = {name: self._raw[alias], **self._raw}
            self._seen.add(alias)

    def zero_as_missing(self, *names: str) -> None:
        """Read a field of 0 as a missing one."""
        self._raw = {name: None if name in names and value == 0 else value for name, value in self._raw.items()}

    def problem(self, text: str) -> None:
        """Record a problem, which `read` raises, unless it may follow from a wrong value that was reported before."""
        if not self._problems.has_replaced:
            self._report(text)

    def _report(self, text: str) -> None:
        self._problems.append(self._prefix + text)

    def _replaced(self, text: str, replacement: C) -> C:
        """Report a wrong value, and return another one to go on with."""
        self._report(text)
        self._problems.has_replaced = True
        return replacement

    def inner(self, name: str) -> Fields:
        """Return an object within this one, read as strictly. Errors name its fields as `name.field`."""
        if name not in self._inner:
            value = self.get(name, {})
            if not isinstance(value, dict):
                value = self._replaced(f"{name} must be an object, got {shortened(value)}", {})
            inner = self._inner[name] = Fields(value)
            inner._prefix, inner._problems = f"{self._prefix}{name}.", self._problems
        return self._inner[name]

    def _checked(self, name: str, value: Any, kind: type[T]) -> T:
        limit = MAX_LAYERS if name in LAYERS else MAX_INT
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (int, kind)):
            wanted = f"of type {kind.__name__}"
        elif kind is not bool and not 0 < value < math.inf:
            wanted = "positive and finite"
        elif kind is float and not MIN_FLOAT <= value <= MAX_FLOAT:
            wanted = f"from {MIN_FLOAT:g} to {MAX_FLOAT:g}"
        elif kind is int and value > limit:
            wanted = f"at most {limit:,}"
        else:
            return kind(value)
        return self._replaced(f"{name} must be {wanted}, got {shortened(value)}", kind(1))

    def read(self, reader: Callable[[Fields], C]) -> C:
        """Return `reader(self)`.

        Raises:
          ConfigError: there are problems, or fields that the reader did not ask for; the message names them all.
        """
        try:
            config = reader(self)
        except ConfigError as error:
            raise ConfigError("config.json: " + "; ".join(self._problems or [str(error)])) from error
        if unknown := sorted(self._unknown()):
            self._problems.append(
                f"fields not understood, which may change the computation: {', '.join(unknown)} "
                "(remove the fields that you know to change nothing from config.json)"
            )
        if self._problems:
            raise ConfigError("config.json: " + "; ".join(self._problems))
        return config

    def _unknown(self) -> Iterator[str]:
        yield from (self._prefix + name for name in set(self.names) - self._seen)
        for inner in self._inner.values():
            yield from inner._unknown()
