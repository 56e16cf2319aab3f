"""Several processes, on one machine or many, that hold one mesh.

Process 0 is the driver: it takes requests, and broadcasts each step to the workers before it runs the step. Every
worker runs the same steps in the same order.

process_group.py   the interface, and a process without others
member.py          base of driver and worker: the end of a process, and its failure
driver.py          process 0
worker.py          the other processes
initialize.py      `join`: connect the processes
"""

from moe_jax.engine.distributed.driver import Driver
from moe_jax.engine.distributed.initialize import join
from moe_jax.engine.distributed.process_group import ProcessGroup, SingleProcess
from moe_jax.engine.distributed.worker import Worker

__all__ = ["Driver", "ProcessGroup", "SingleProcess", "Worker", "join"]
