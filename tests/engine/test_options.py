"""Settings of an engine."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest

from moe_jax.engine import OptionArguments, Options
from moe_jax.errors import RequestError


def test_option_arguments_are_the_options_with_defaults() -> None:
    hints = get_type_hints(Options)
    assert get_type_hints(OptionArguments) == {
        field.name: hints[field.name] for field in fields(Options) if field.name != "max_length"
    }


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "0.8"])
def test_cache_memory_must_be_a_share(share: float) -> None:
    with pytest.raises(RequestError, match="cache_memory must be a share above 0 and at most 1, got"):
        Options(64, cache_memory=share)
