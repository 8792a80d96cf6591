"""Loss and gradient of a training step as a CUDA graph: captured once, replayed each step after.

A step of small kernels waits for Python, not for the GPU; a replay is one launch. The graph is the method's
own `loss` and the backward pass, run by the same function as without a graph: both give the same numbers.

* what a step reads lies where it lay at the capture: the batch is copied into buffers of its own, and what
  `loss` takes from the step's number (`Method.schedule`) is written into scalars on the device;
* what `loss` decides on the host is fixed in a graph: one is captured for each `Method.graph_key`;
* random numbers are drawn anew by each replay, those that the step would have drawn without a graph: torch
  moves the generator on by as much;
* the warm-up before a capture, and the capture, leave buffers and generators as they were.

See torch's notes on CUDA semantics, "CUDA Graphs", whole-network capture.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten  # as torch.cuda.graphs does

from .methods.base import Method

_WARM_UP = 3
"""passes before a capture: kernels are compiled and loaded, libraries make their handles and choose"""


@dataclass
class PassResult:
    """What a pass computes, in the same memory at each replay."""

    losses: dict[str, Tensor]
    """detached scalars, by name"""
    gradients: list[Tensor | None]
    """of each parameter"""


class Capture(Protocol):
    """Captures a pass; calling what comes with its result runs it again into the same memory."""

    def __call__(self, run: Callable[[], PassResult]) -> tuple[PassResult, Callable[[], None]]: ...


class CudaCapture:
    """Warms up and captures on one side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # shared by all graphs: they never run at once, and no result is read after the next replay
        self.pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def works_on(device: torch.device) -> bool:
        """Whether there are CUDA graphs on `device`."""
        return device.type == "cuda"

    def __call__(self, run: Callable[[], PassResult]) -> tuple[PassResult, Callable[[], None]]:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)
            gc.collect()  # a dead cycle that holds an event or a graph must not be freed during the capture
            graph = torch.cuda.CUDAGraph()
            # thread_local: the loader's thread pins memory meanwhile, which "global" takes for an error
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                result = run()
        return result, graph.replay


class GraphedGradient:
    """`gradient(batch, step, **options)`, captured and replayed where the method's `graph_key` is not None.

    Args:
        method: on its device, in training mode at each call.
        gradient: zeroes every `.grad` to None, computes `loss` and its gradient, and returns the losses,
            detached; it reads nothing that changes between steps but parameters, buffers, its arguments and
            `method.scheduled`.
        capture: `CudaCapture`, or what stands for it in a test.
    """

    def __init__(self, method: Method, gradient: Callable[..., dict[str, Tensor]], capture: Capture) -> None:
        self.method, self.gradient, self.capture = method, gradient, capture
        self.device = next(method.parameters()).device
        self.captured = 0
        self._batch: _StaticBatch | None = None
        self._schedule: dict[str, Tensor] = {}
        self._graphs: dict[Hashable, tuple[PassResult, Callable[[], None]]] = {}

    def __call__(self, batch: Any, step: int, **options: Any) -> dict[str, Tensor]:
        """The losses, and the gradients in `.grad`. A batch of another shape than the first runs eagerly."""
        key = self.method.graph_key(step)
        if key is not None and self._batch is None:
            self._batch = _StaticBatch(batch)
        if key is None or self._batch is None or not self._batch.take(batch):
            return self.gradient(batch, step, **options)
        for name, value in self.method.schedule(step).items():
            if name not in self._schedule:
                self._schedule[name] = torch.zeros((), device=self.device)
            self._schedule[name].fill_(value)
        key = (key, *sorted(options.items()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(step, options)
        result, replay = self._graphs[key]
        replay()
        for parameter, gradient in zip(self.method.parameters(), result.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in result.losses.items()}

    def _capture(self, step: int, options: dict[str, Any]) -> tuple[PassResult, Callable[[], None]]:
        buffers = [(buffer, buffer.clone()) for buffer in self.method.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        self.captured += 1
        try:
            with torch.random.fork_rng(devices):
                return self.capture(partial(self._run, step, options))
        except RuntimeError as error:
            raise RuntimeError(
                f"a training step of {type(self.method).__name__} cannot be captured in a CUDA graph: "
                f"{error}; cuda_graph='off' (--cuda-graph off) trains without one"
            ) from error
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _run(self, step: int, options: dict[str, Any]) -> PassResult:
        assert self._batch is not None
        self.method.held_schedule = self._schedule
        try:
            losses = self.gradient(self._batch.tensors(), step, **options)
        finally:
            self.method.held_schedule = None
        for name, value in losses.items():
            if value.device != self.device:
                raise RuntimeError(
                    f"its value {name!r} is on {value.device}, where a replay would not renew it"
                )
        return PassResult(losses, [parameter.grad for parameter in self.method.parameters()])


class _StaticBatch:
    """A batch whose tensors keep their memory: others of its structure, shapes and dtypes are copied in."""

    def __init__(self, batch: Any) -> None:
        leaves, self._structure = tree_flatten(batch)
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def take(self, batch: Any) -> bool:
        """Copy `batch` in; False, and nothing done, where it is of another make."""
        leaves, structure = tree_flatten(batch)
        if self._make(leaves, structure) != self._make(self._leaves, self._structure):
            return False
        for leaf, value in zip(self._leaves, leaves, strict=True):
            if isinstance(leaf, Tensor):
                leaf.copy_(value, non_blocking=True)
        return True

    def tensors(self) -> Any:
        return tree_unflatten(self._leaves, self._structure)

    @staticmethod
    def _make(leaves: list[Any], structure: TreeSpec) -> tuple[Any, ...]:
        return structure, [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
