"""The long short-term memory (Hochreiter and Schmidhuber 1997, with forget gate), in forms that agree.

B: batch   T: time   D: width   E: hidden width

    i, f, g, o = x_t W^T + h_(t-1) U^T + b (gates in this order, torch's)
    c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)

Signature of both forms:

    x (B, T, D)   W (4 E, D)   U (4 E, E)   b (4 E)   hidden, cell (B, E)  ->  h (B, T, E), hidden, cell
"""

import torch
from torch import Tensor

from models.ops.precision import autocast_type, without_autocast


def reference(x: Tensor, W: Tensor, U: Tensor, b: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    """One step at a time."""
    hs = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ W.t() + hidden @ U.t() + b).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        hs.append(hidden)
    return torch.stack(hs, 1), hidden, cell


def fused(x: Tensor, W: Tensor, U: Tensor, b: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    """torch's own: the products with W for all steps at once; cuDNN on a GPU. Under autocast in its type."""
    dtype = autocast_type(x.device)
    if dtype is not None:  # by itself torch would take float16 on a GPU, in which small gradients vanish
        x, W, U, b, hidden, cell = (m.to(dtype) for m in (x, W, U, b, hidden, cell))
    before, weights = (hidden[None], cell[None]), (W, U, b, torch.zeros_like(b))
    trains = torch.is_grad_enabled()  # cuDNN keeps what its backward pass needs only where it is told so
    with without_autocast(x.device):
        h, hidden, cell = torch.lstm(x, before, weights, True, 1, 0.0, trains, False, True)
    return h, hidden[0], cell[0]
