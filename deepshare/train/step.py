"""One training step: forward, loss, backward, update; on a GPU one captured CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from deepshare.data import Batch
from deepshare.nn import SharedReLU2d
from deepshare.train.compute import Compute
from deepshare.train.errors import TrainingError
from deepshare.train.task import Task

Work = Callable[[], Tensor]
WARM_UP = 3  # eager steps before a capture: cuDNN chooses, optimizer state and lazily made buffers come to be


class TrainingStep:
    """Called with a batch, trains `model` on it; returns the loss as a 0-dim tensor, valid until the next call.

    model: what is run; its forward pass is compiled where `compute` says so
    task: batch to loss; optimizer: over the parameters of `model`
    """

    def __init__(self, model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, compute: Compute) -> None:
        self.model, self.task, self.optimizer, self.compute = model, task, optimizer, compute
        self._student: nn.Module = torch.compile(model, dynamic=False) if compute.compile else model  # type: ignore[assignment]

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def __call__(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return self._update(batch)

    def _update(self, batch: Batch) -> Tensor:
        with self.compute.autocast():
            loss = self.task(self._student, batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Recorder(Protocol):
    """What runs a piece of work aside from the device's main stream, and records it."""

    def run(self, work: Work) -> Tensor:
        """The work done once, on the stream it will be captured on."""

    def capture(self, work: Work) -> Work:
        """A call that does the work again on the same memory; recording it does nothing yet."""


class CudaRecorder:
    """PyTorch's "whole-network capture", on the stream of the warm-up: autograd and cuBLAS keep things by stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Work) -> Tensor:
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            result = work()
        main.wait_stream(self.stream)
        return result

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CapturedStep(TrainingStep):
    """TrainingStep that records itself and then replays: the host's part of a step is one launch.

    A replay reads the batch from buffers that every call fills, the learning rate from a tensor; what else changes
    between steps (soft channels, gamma, lambda) lies in tensors already. Hard gates are another kernel than soft ones,
    so that the step is recorded anew when a module's gates become hard. Each recording comes after WARM_UP eager steps,
    which train as any other; no batch is trained on twice.

    Raises TrainingError: the step cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        compute: Compute,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(model, task, optimizer, compute)
        self.recorder = recorder or CudaRecorder(compute.device)
        self._gates = [module for module in model.modules() if isinstance(module, SharedReLU2d)]
        self._hard: tuple[bool, ...] | None = None
        self._to_warm = WARM_UP
        self._buffers: Batch | None = None
        self._replay: Work | None = None
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=compute.device)
            if "capturable" in group:  # Adam asks to be told
                group["capturable"] = True

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(value)

    def __call__(self, batch: Batch) -> Tensor:
        buffers = self._filled(batch)
        hard = tuple(gate.is_hard for gate in self._gates)
        if hard != self._hard:
            self._hard, self._to_warm, self._replay = hard, WARM_UP, None
        if self._to_warm:
            self._to_warm -= 1
            return self.recorder.run(lambda: super(CapturedStep, self).__call__(buffers))
        if self._replay is None:
            self._replay = self._captured(buffers)
        return self._replay()

    def _filled(self, batch: Batch) -> Batch:
        """The buffers with `batch` in them."""
        if self._buffers is None:
            images = batch.images.to(memory_format=self.compute.memory_format, copy=True)
            self._buffers = Batch(images, batch.labels.clone(), batch.rows.clone())
        for buffer, values in zip(self._buffers, batch, strict=True):
            if buffer.shape != values.shape:
                raise ValueError(
                    f"CapturedStep: every batch must have the shape of the first, {list(buffer.shape)} "
                    f"(got {list(values.shape)})"
                )
            buffer.copy_(values)
        return self._buffers

    def _captured(self, buffers: Batch) -> Work:
        self.optimizer.zero_grad(set_to_none=True)  # the graph's backward pass makes gradients of its own
        try:
            return self.recorder.capture(lambda: self._update(buffers))
        except RuntimeError as error:
            raise TrainingError(
                f"the training step cannot be captured as a CUDA graph (compute.graph = false trains without): {error}"
            ) from error


def training_step(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, compute: Compute) -> TrainingStep:
    """The step that `compute` asks for."""
    return (CapturedStep if compute.graph else TrainingStep)(model, task, optimizer, compute)
