"""Full-resolution knowledge distillation for semantic segmentation at almost no cost.

    from heteroakd_fast import HeteroAKDLoss
    loss_fn = HeteroAKDLoss(num_classes=19)
    out = loss_fn(student_logits, target, teacher_logits=teacher_logits)
    out.loss.backward()

`functional` has the same as functions, `reference` the formulas in plain PyTorch, and
`python -m heteroakd_fast.info` says which backends work here and why the others do not.
"""

from . import functional
from .backends import BackendUnavailableError, ExtensionMissingWarning, use_backend
from .channelwise import ChannelWiseLoss
from .losses import HeteroAKDLoss
from .output import DistillationOutput
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "ChannelWiseLoss",
    "DistillationOutput",
    "ExtensionMissingWarning",
    "HeteroAKDLoss",
    "__version__",
    "functional",
    "use_backend",
]
