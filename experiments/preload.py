"""What cells import, imported once by the server that their processes are forked from, and what is made once in a
process made there."""

import gc
from contextlib import suppress

import torch._dynamo  # noqa: F401  # a custom operator's first call imports it: longer than most cells take

import experiments.cells  # noqa: F401
import models.ops.kernels.numba_form
from models.ops.kernels.numba_runtime import get_ready

with suppress(Exception):  # a broken installation raises anything; who needs the kernels will say so
    import models.ops.kernels.cuda_form  # noqa: F401  # imports the libraries, which do not touch the GPU yet

get_ready()
# all of this stays: a cell's collector would look through it each time, and with that get pages of its own
gc.collect()
gc.freeze()
