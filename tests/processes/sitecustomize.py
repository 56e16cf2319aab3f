"""Garbage collection in the processes that tests start: they mostly import, and a third of that would be collection."""

import atexit
import gc

gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
