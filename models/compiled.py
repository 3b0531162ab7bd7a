"""`torch.compile`, a block at a time, the same way for every architecture.

The blocks of a kind share their code, so one of each kind is compiled however many there are: seconds instead of
minutes for a deep model. What stands outside the blocks, embedding, last norm, head and loss, runs as it is; but in a
decode step, where reading the head counts, the last norm and the head are compiled too.
"""

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from models import ops
from models.language_model import LanguageModel
from models.ops.attention import rotary_table
from models.ops.kernels import has_triton

# With one row a product is a sum over a matrix that is read once. Only under this option does torch generate it so,
# fused with what is beside it, and not call a library's matrix product; the price is that the first call compiles and
# times tens of configurations of each kernel. Such a product takes about as long to start as to compute: on compute
# capability 9.0 and up a kernel starts while the one before it ends, and waits only where it reads what that one wrote.
ONE_ROW = {"coordinate_descent_tuning": True, "triton.enable_pdl": True}
LIBRARIES = ("mamba-ssm", "causal-conv1d")
MOST_VERSIONS = 64  # of a block's code: kinds of blocks times shapes; beyond that torch would stop compiling in silence


def compile_blocks(model: LanguageModel, method: Literal["forward", "step"]) -> None:
    """Compile `method` of every block, in place, at its first call; shapes are constants in the compiled code. With
    "step" also the model's `step_logits`.

    A step has to be one of models.recorded.RepeatableStep: an ordinary one has its position as a number on the host,
    and would be compiled anew at every token.
    """
    torch.compiler.assume_constant_result(rotary_table)  # or it would be computed anew inside
    torch.compiler.assume_constant_result(has_triton)  # it imports
    torch.compiler.config.cache_key_tag = operators_version()
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    how: dict[str, Any] = {"dynamic": False, "options": ONE_ROW if method == "step" else None}
    for block in model.blocks:
        setattr(block, method, torch.compile(getattr(block, method), **how))
    if method == "step":
        model.step_logits = torch.compile(model.step_logits, **how)


@cache
def operators_version() -> str:
    """A hash of the code of our operators and of the versions of the libraries that they call. torch keeps on disk what
    it compiles, and of an operator in it no more than the name: without this, a graph that was compiled before a change
    would go on with the old shapes and the old backward pass."""
    digest = hashlib.sha256()
    folder = Path(ops.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    for library in LIBRARIES:
        try:
            digest.update(f"{library} {metadata.version(library)}".encode())
        except metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()
