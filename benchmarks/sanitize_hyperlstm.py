"""One small case of every CUDA kernel of the HyperLSTM, for compute-sanitizer (see gpu.sh).

Rows in registers and in shared memory, aligned and not, with and without layer norm, lengths and dropout,
every dtype, several rows a CTA, forward and backward over several chunks of steps.
"""

from __future__ import annotations

from itertools import cycle, product

import torch

from sketchfast.kernels import hyperlstm_loop as loop
from sketchfast.nn import HyperLSTM
from sketchfast.ops import hyperlstm as op

#: Hidden, hyper, batch: one unit; odd; aligned; many rows; the widest in registers and the next.
SIZES = ((1, 1, 1), (7, 5, 3), (68, 36, 5), (32, 16, 300), (2048, 64, 2), (2052, 33, 2))
#: Of the products, and whether by autocast.
DTYPES = ((torch.float32, False), (torch.bfloat16, True), (torch.float16, False))


def run(hidden: int, hyper: int, batch: int, dtype: torch.dtype, autocast: bool, layer_norm: bool) -> None:
    module = HyperLSTM(3, hidden, hyper, 2, layer_norm=layer_norm, recurrent_dropout=0.3).cuda()
    if not autocast:
        module = module.to(dtype)
    own = next(module.parameters()).dtype
    x = torch.randn(9, batch, 3, device="cuda", dtype=own, requires_grad=True)
    state = tuple(torch.randn(batch, n, device="cuda", dtype=own) for n in (hidden, hidden, hyper, hyper))
    base = torch.randn(batch, 4 * (hidden + hyper), device="cuda", dtype=own, requires_grad=True)
    for lengths in (None, torch.randint(0, 10, (batch,), device="cuda")):
        with torch.autocast("cuda", dtype=dtype, enabled=autocast):
            out, last = op.hyperlstm(
                x, state, dict(module.named_parameters()), base=base, lengths=lengths, recurrent_dropout=0.3,
                seed=5, impl="native",
            )  # fmt: skip
        (out.float().sum() + sum(part.float().sum() for part in last)).backward()
    for leaf in (x, base, *module.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def main() -> None:
    torch.manual_seed(0)
    loop.CHUNK_ELEMENTS["cuda"] = 0  # chunks of four steps
    for (size, dtype), layer_norm in zip(product(SIZES, DTYPES), cycle((True, False)), strict=False):
        run(*size, *dtype, layer_norm)
    torch.cuda.synchronize()
    print("every kernel of the HyperLSTM ran")


if __name__ == "__main__":
    main()
