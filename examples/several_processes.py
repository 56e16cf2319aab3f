"""One model on the devices of several processes, as on several machines.

Run it with `python examples/several_processes.py`: it starts two processes of itself, with two virtual devices each. On
a cluster start one process on each machine instead; `distributed.join()` needs no arguments where JAX detects the
cluster (SLURM, Open MPI, Kubernetes).
"""

import socket
import subprocess
import sys

import jax

from moe_jax import LLM, SamplingParams, distributed

PROCESSES = 2


def main() -> int:
    """Start the processes, and report how they ended."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"  # a free port, at which process 0 waits for the others
    commands = [[sys.executable, __file__, coordinator, str(process)] for process in range(PROCESSES)]
    started = [subprocess.Popen(command) for command in commands]
    return max(abs(process.wait()) for process in started)


def member(coordinator: str, process: int) -> None:
    """Hold this process's part of the model; process 0 alone takes prompts."""
    jax.config.update("jax_num_cpu_devices", 2)
    with distributed.join(coordinator, PROCESSES, process) as process_group:
        llm = LLM(mesh="expert=4", process_group=process_group)
        if not process_group.is_driver:
            llm.run_worker()  # until process 0 leaves
            return
        for output in llm.generate(["12+34=", "999+1="], SamplingParams(temperature=0, max_tokens=8)):
            print(f"{output.text} from {jax.device_count()} devices of {jax.process_count()} processes", flush=True)


if __name__ == "__main__":
    sys.exit(member(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main())
