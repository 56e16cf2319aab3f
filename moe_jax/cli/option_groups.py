"""Dataclasses as groups of command-line options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Expand a command's dataclass parameters into one option for each field.

    typer reads options from a function's signature and does not know dataclasses. The returned function has the
    expanded signature, builds the dataclasses from the parsed options, and passes them to `command`.

    Raises:
      ValueError: two options have the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options = []
    for name, parameter in signature(command).parameters.items():
        options += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]

    @wraps(command)
    def run(**values: Any) -> None:
        built = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **built)

    return _with_options(run, options)


def with_group(command: Callable[..., None], group: type, use: Callable[[Any], None]) -> Callable[..., None]:
    """Add the options of a dataclass to a command. `use` receives the dataclass before the command runs."""
    hints = get_type_hints(command, include_extras=True)
    own = [parameter.replace(annotation=hints[name]) for name, parameter in signature(command).parameters.items()]

    @wraps(command)
    def run(**values: Any) -> None:
        use(group(**{field.name: values.pop(field.name) for field in fields(group)}))
        command(**values)

    return _with_options(run, [*own, *_options(group)])


def _with_options(run: Any, options: list[Parameter]) -> Callable[..., None]:
    run.__signature__ = Signature(options)
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _options(group: Any) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
