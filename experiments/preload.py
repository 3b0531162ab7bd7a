"""What cells import, imported once by the server that their processes are forked from."""

from contextlib import suppress

import torch._dynamo  # noqa: F401  # a custom operator's first call imports it: longer than most cells take

import experiments.cells  # noqa: F401
import models.ops.kernels.numba_form

with suppress(Exception):  # a broken installation raises anything; who needs the kernels will say so
    import models.ops.kernels.cuda_form  # noqa: F401  # imports the libraries, which do not touch the GPU yet
