"""One small case of every CUDA kernel of Sinkhorn, for compute-sanitizer (see gpu.sh).

Every regime (a CTA a problem, a cluster of CTAs, the cost streamed) with and without a tolerance; clouds of
points in few and in many dimensions.
"""

from __future__ import annotations

import torch

import sketchfast

#: Rows and columns: a warp, a CTA, clusters of two and more, more rows than registers hold.
SHAPES = ((7, 9), (60, 200), (120, 300), (200, 600), (300, 500), (400, 90), (3, 5000))


def costs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    cost = torch.rand(2, rows, columns, device="cuda").to(dtype)
    cost[0, 0, 0] = torch.inf
    return cost.requires_grad_()


def main() -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        a = torch.full((2, rows), 1 / (rows - 1), device="cuda")
        a[:, 1] = 0
        for dtype, epsilon in ((torch.float32, 0.05), (torch.bfloat16, 1e-3)):
            cost = costs(rows, columns, dtype)
            for tol, grad in ((None, "unrolled"), (1e-3, "implicit")):
                out = sketchfast.sinkhorn(cost, epsilon, a=a, max_iter=4, tol=tol, grad=grad, impl="native")
                (out.plan.float().square().sum() + out.f.nan_to_num(0.0, 0.0, 0.0).sum()).backward()
            sketchfast.sinkhorn_cost(cost, epsilon, a=a, max_iter=4, impl="native").sum().backward()
            assert cost.grad is not None
            assert cost.grad.isfinite().all()
        sketchfast.swav_assign(torch.randn(columns, rows, device="cuda"), impl="native")
    for dimensions in (2, 70):
        x = torch.randn(2, 150, dimensions, device="cuda", requires_grad=True)
        y = torch.randn(2, 1100, dimensions, device="cuda", requires_grad=True)
        for tol in (None, 1e-3):
            sketchfast.sinkhorn_points(x, y, 5.0, max_iter=3, tol=tol, impl="native").value.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
    torch.cuda.synchronize()
    print("every kernel of sinkhorn ran")


if __name__ == "__main__":
    main()
