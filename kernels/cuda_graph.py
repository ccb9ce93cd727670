"""A whole training step as one CUDA graph: the host launches it once instead of some hundred times.

Small networks on a GPU are bound by launches. One pseudo-batch of zero-shot knowledge transfer, for
example, is 1 + 10 optimiser steps of some hundred kernels each, most of them shorter than the time
that the host needs to launch one.
"""

import torch


class CapturedStep:
    """Call `step`, a function that changes tensors in place, as a CUDA graph once it is warm.

    The first calls run `step` as it is, on a side stream, as PyTorch asks for. They make what is
    made lazily: gradients, optimiser state, cuDNN's plans. Each call, the capturing one too, has
    the effect of exactly one step.

    A graph demands of `step`:
    - no synchronisation with the host and no control flow on values;
    - random numbers from the device's default generator only;
    - all that varies (learning rate, counters, sums) in device tensors that stay the same objects;
    - nothing kept that still carries an autograd graph.

    Args:
        step: a function of no arguments; what it returns is ignored.
        enabled: whether to capture. If false, or without a GPU, every call runs `step` as it is.
        n_warmup: the number of calls before the capture, at least 1.

    Raises:
        ValueError: n_warmup is below 1.

    Note:
        Load a checkpoint before the first call: the graph keeps the addresses that it has seen.

    Example:
        >>> x = torch.zeros(1)
        >>> step = CapturedStep(lambda: x.add_(1), enabled=x.is_cuda)
        >>> for _ in range(5):
        ...     step()
        >>> x
        tensor([5.])
    """

    def __init__(self, step, enabled=True, n_warmup=3):
        if n_warmup < 1:
            raise ValueError(
                f"CapturedStep: expected n_warmup of at least 1, got {n_warmup}; 3 is the default"
            )
        self.step = step
        self.enabled = enabled and torch.cuda.is_available()
        self.n_warmup = n_warmup
        self.n_calls = 0
        self.stream = None
        self.graph = None

    def __call__(self):
        self.n_calls += 1
        if not self.enabled:
            self.step()
        elif self.n_calls <= self.n_warmup:
            self.warm_up()
        else:
            if self.graph is None:
                self.graph = self.capture()
            self.graph.replay()

    def warm_up(self):
        """Run one step on the side stream."""
        # One stream for all these calls: memory that one frees serves the next only there.
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self):
        """Record one step without running it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph
