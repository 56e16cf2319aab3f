"""Garbage collection of the processes that tests start: most of them only import, a third of which is collection."""

import atexit
import gc

gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
