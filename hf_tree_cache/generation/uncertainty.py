"""How unsure a model is of its next tokens: one pass over the logits for all who ask."""

from __future__ import annotations

from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def measure(logits: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp, entropy and varentropy of each row, in nats: float32 ``[R, 3]``.

    Varentropy is the variance of ``-log p``, in nats squared. A row with NaN, +inf or nothing but
    -inf gets NaN.

    Args:
        logits: ``[R, V]``.
    """
    if HAS_TRITON and logits.is_cuda and logits.stride(1) == 1:
        from . import uncertainty_kernel

        if logits.dtype in uncertainty_kernel.DTYPES:
            return uncertainty_kernel.measure(logits)
    logsumexp = logits.float().logsumexp(-1, keepdim=True)
    # A token of no probability counts for nothing: 0 x log 0 = 0.
    logprobs = (logits.float() - logsumexp).clamp_min(-1e4)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).sum(-1, keepdim=True)
    varentropy = (probs * (logprobs + entropy).square()).sum(-1, keepdim=True)
    return torch.cat([logsumexp, entropy, varentropy], 1)


class Uncertainty:
    """What :func:`measure` found of the logits of one step, measured once and read once."""

    def __init__(self) -> None:
        self._of: torch.Tensor | None = None
        self._version = 0
        self._measured: torch.Tensor | None = None
        self._read: list[list[float]] | None = None

    def measured(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 ``[R, 3]``, on the device."""
        # A processor may have changed them in place.
        version = 0 if logits.is_inference() else logits._version
        if self._measured is None or self._of is not logits or self._version != version:
            self._of, self._version = logits, version
            self._measured, self._read = measure(logits), None
        return self._measured

    def read(self, logits: torch.Tensor) -> list[list[float]]:
        """The same on the host, which waits for it."""
        measured = self.measured(logits)
        if self._read is None:
            self._read = measured.tolist()
        return self._read
