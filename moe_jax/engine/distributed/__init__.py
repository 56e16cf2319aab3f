"""Several processes, on one machine or many, that hold one mesh.

Process 0 is the driver: it takes requests, and broadcasts each step to the workers before it runs the step. Every
worker runs the same steps in the same order.

process_group.py   the interface, and a process without others
member.py          base of driver and worker: the end of a process, and its failure
driver.py          process 0
worker.py          the other processes
initialize.py      `join`: connect the processes
rendezvous.py      connections from the driver to the workers, with a proof of the key
addresses.py       the interface on which the driver listens
messages.py        messages as bytes that can run no code
"""

from moe_jax.engine.distributed.driver import Driver
from moe_jax.engine.distributed.initialize import join
from moe_jax.engine.distributed.messages import ExplainRequest, decode, encode
from moe_jax.engine.distributed.process_group import ProcessGroup, SingleProcess
from moe_jax.engine.distributed.worker import Worker

__all__ = ["Driver", "ExplainRequest", "ProcessGroup", "SingleProcess", "Worker", "decode", "encode", "join"]
