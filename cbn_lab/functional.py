"""The pure forms, in the argument order of ``torch.nn.functional.batch_norm``."""

from cbn_lab.batch_norm import batch_norm
from cbn_lab.complex_batch_norm import complex_batch_norm

__all__ = ["batch_norm", "complex_batch_norm"]
