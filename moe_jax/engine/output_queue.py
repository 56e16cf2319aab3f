"""Queue of generations with new output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_jax.engine.generation import Generation


class OutputQueue:
    """Generations with output that was not read yet, in the order of their first unread output."""

    def __init__(self) -> None:
        self._waiting: dict[Generation, None] = {}

    def add(self, generation: Generation) -> None:
        """Add a generation, unless it is in the queue already."""
        self._waiting[generation] = None

    def read(self) -> Iterator[Generation]:
        """Remove and yield generations until the queue is empty."""
        while self._waiting:
            generation = next(iter(self._waiting))
            del self._waiting[generation]
            yield generation
