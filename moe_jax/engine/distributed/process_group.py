"""Communication of one process with the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from moe_jax.errors import ProcessGroupError


class ProcessGroup(ABC):
    """Group of processes that hold one mesh.

    A context manager: processes that leave it normally wait for each other. An error that leaves it is printed and ends
    all processes.
    """

    is_driver: bool
    """True if requests are given to this process."""

    @abstractmethod
    def broadcast(self, message: Any) -> None:
        """Driver: send a message to all workers.

        Raises:
          ProcessGroupError: this process is a worker.
        """

    @abstractmethod
    def messages(self) -> Iterator[Any]:
        """Worker: yield the driver's messages until the driver leaves.

        Raises:
          ProcessGroupError: this process is the driver.
        """

    @abstractmethod
    def check_agreement(self, settings: Mapping[str, object]) -> None:
        """Compare the settings of all processes.

        Raises:
          ProcessGroupError: a setting of this process differs from that of process 0.
        """

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SingleProcess(ProcessGroup):
    """A process without others."""

    is_driver = True

    def broadcast(self, message: Any) -> None:
        pass

    def messages(self) -> Iterator[Any]:
        raise ProcessGroupError("this process has no driver, since it is the only one: call generate, not run_worker")

    def check_agreement(self, settings: Mapping[str, object]) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
