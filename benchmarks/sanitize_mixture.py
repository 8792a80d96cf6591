"""One small case of every CUDA kernel of the mixture loss, for compute-sanitizer (see gpu.sh)."""

from __future__ import annotations

from itertools import cycle

import torch

from sketchfast.ops.mixture import mixture_loss

#: Positions and components: a lane with one component, with two, with any number; odd sizes about a CTA.
SHAPES = ((0, 3), (1, 1), (5, 20), (63, 32), (130, 33), (9000, 2), (7, 64), (6, 65), (5, 200))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    torch.manual_seed(0)
    for (positions, components), dtype in zip(SHAPES, cycle(DTYPES), strict=False):
        output = torch.randn(positions, 3 + 6 * components, device="cuda").to(dtype).requires_grad_()
        states = torch.randint(3, (positions,), device="cuda")
        offsets = torch.randn(positions, 2, device="cuda")
        target = torch.cat((offsets, torch.nn.functional.one_hot(states, 3)), 1)
        sum(mixture_loss(output, target, impl="native")).backward()
        assert output.grad is not None
        assert output.grad.isfinite().all()
        mixture_loss(output.detach(), target, impl="native")
    torch.cuda.synchronize()
    print("every kernel of the mixture loss ran")


if __name__ == "__main__":
    main()
