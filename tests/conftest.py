"""Settings of every test run: the same examples each time, and one thread of torch for each worker."""

import os

from hypothesis import settings

# Before torch is imported: the workers of pytest-xdist share the cores, and so do the processes that tests start.
# Runs that are compared bit for bit need one thread, too.
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("fixed")
