"""Threads of the tests' own process, and properties that may take their time."""

import os

from hypothesis import settings

# Before torch is imported. Tests are many small operations: where something else runs on the same cores, a thread that
# spins until the others have had their turn makes each of them take as long as a turn, and the suite hours.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

settings.register_profile("lab", deadline=None)  # the first example may compile a kernel, on a busy machine
settings.load_profile("lab")
