"""Threads of the tests' own process."""

import os

# Before torch is imported. Tests are many small operations: where something else runs on the same cores, a thread that
# spins until the others have had their turn makes each of them take as long as a turn, and the suite hours.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
