"""For the processes that tests start. Most do little but import, a third of which is looking for garbage."""

import atexit
import gc

gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
