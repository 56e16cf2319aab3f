"""Load a checkpoint in a separate process and print the host memory that loading needs, as JSON.

python load_and_measure.py CHECKPOINT MESH
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

from moe_jax.checkpoints import Checkpoint  # noqa: E402
from moe_jax.models import ShardedDecoder  # noqa: E402
from moe_jax.sharding import as_placement  # noqa: E402


class PeakMemory:
    """Peak memory of this process, in bytes, without mapped files, which the kernel can drop. A context manager."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.0005):
            self.peak = max(self.peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(path: str, mesh: str) -> None:
    checkpoint = Checkpoint(path)
    decoder = ShardedDecoder(checkpoint.config, as_placement(mesh), "float32")
    checkpoint.load(decoder)  # compile first: the measurement excludes compilation
    with PeakMemory() as memory:
        parameters = checkpoint.load(decoder)
        jax.block_until_ready(parameters)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(parameters) for shard in leaf.addressable_shards)
    print(json.dumps({"taken": memory.peak - memory.before, "held": held}))


if __name__ == "__main__":
    main(*sys.argv[1:])
