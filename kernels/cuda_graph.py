"""A whole training step as one CUDA graph: launched once by the host instead of some hundred times.

Small networks on a GPU are bound by launches: one pseudo-batch of zero-shot knowledge transfer is 1 + 10 optimiser
steps of some hundred kernels each, most of them shorter than the time that the host needs to launch one.
"""

import torch


class CapturedStep:
    """`step`, a function of no arguments that changes tensors in place, as a CUDA graph once it has warmed up.

    The first calls run as they are, on a side stream as PyTorch asks for: lazily made buffers (gradients, optimiser
    state, cuDNN's plans) exist then. They are ordinary steps: each call, the capturing one too, is one step's effect.

    What a graph demands of `step`: no host sync, no control flow on values, random numbers from the device's default
    generator alone, everything that varies (learning rate, counters, sums) in device tensors that stay the same
    objects, nothing kept that still carries an autograd graph.

    Args:
        step: the function.
        enabled: whether to capture: only what works on a GPU. If false, or without a GPU, every call runs `step`.
        n_warmup: calls before the capture, at least 1.

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
        self.step, self.enabled, self.n_warmup = (
            step,
            enabled and torch.cuda.is_available(),
            n_warmup,
        )
        self.n_calls, self.side, self.graph = 0, None, None

    def __call__(self):
        self.n_calls += 1
        if not self.enabled:
            self.step()
        elif self.n_calls <= self.n_warmup:
            # one stream for all these calls: memory that one of them frees serves the next one only there
            self.side = self.side or torch.cuda.Stream()
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.step()
            torch.cuda.current_stream().wait_stream(self.side)
        else:
            if self.graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records, does not run
                    self.step()
                self.graph = graph
            self.graph.replay()
