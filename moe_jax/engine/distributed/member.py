"""One of several processes: its end, and its failure.

The processes talk over sockets, which also report deaths: the kernel closes the sockets of a process that is killed. A
thread of each process waits for that, since the main thread may be in a collective that never ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from abc import abstractmethod
from types import TracebackType
from typing import NoReturn

import jax

from moe_jax.engine.distributed.messages import Shutdown
from moe_jax.engine.distributed.process_group import ProcessGroup
from moe_jax.errors import MoEJaxError, ProcessGroupError

GRACE = 5
"""Seconds for the news of a death to arrive before its effects: collectives that fail, and sockets that close."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit status of an interrupted process."""


def end(shutdown: Shutdown, status: int = 1) -> NoReturn:
    """End this process at once, with an exit status.

    An orderly exit of JAX waits for all processes, and the main thread may be stuck.
    """
    print(f"moe-jax: {shutdown.reason}", file=sys.stderr, flush=True)
    os._exit(status)


class Member(ProcessGroup):
    """One of several processes."""

    def __init__(self, process: int) -> None:
        self.process = process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        error = error or self._leave()
        if error is not None:
            self._fail(error)
        jax.distributed.shutdown()  # waits for all processes

    @abstractmethod
    def _leave(self) -> ProcessGroupError | None:
        """End the conversation. Return an error if the other side is not done."""

    @abstractmethod
    def _send_shutdown(self, shutdown: Shutdown) -> None:
        """Send the shutdown to the other side, if that is still possible."""

    def _fail(self, error: BaseException) -> NoReturn:
        sys.stdout.flush()
        if isinstance(error, KeyboardInterrupt):
            self._send_shutdown(Shutdown(f"process {self.process} was interrupted"))
            end(Shutdown("interrupted"), INTERRUPTED)
        if not isinstance(error, MoEJaxError):
            time.sleep(GRACE)  # if the cause is a death, the watching thread ends this process meanwhile
        if not isinstance(error, MoEJaxError | OSError):
            traceback.print_exception(error)
        self._send_shutdown(Shutdown(f"process {self.process} has ended: {type(error).__name__}: {error}"))
        end(Shutdown(str(error) or type(error).__name__))
