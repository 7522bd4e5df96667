"""Full-resolution knowledge distillation for semantic segmentation at almost no cost.

    from heteroakd_fast import SegmentationLoss
    from heteroakd_fast.terms import KD, CrossEntropy, HeteroAKD
    loss_fn = SegmentationLoss(CrossEntropy(), KD(0.1), HeteroAKD(1.0))
    out = loss_fn(student_logits, target, teacher_logits)
    out.loss.backward()

`functional` has the same as functions, `reference` the formulas in plain PyTorch, and
`python -m heteroakd_fast.info` says which backends work here and why the others do not.
"""

from . import functional, terms
from .backends import BackendUnavailableError, ExtensionMissingWarning, use_backend
from .channelwise import ChannelWiseLoss
from .losses import HeteroAKDLoss, SegmentationLoss
from .output import DistillationOutput
from .projector import Projection
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "ChannelWiseLoss",
    "DistillationOutput",
    "ExtensionMissingWarning",
    "HeteroAKDLoss",
    "Projection",
    "SegmentationLoss",
    "__version__",
    "functional",
    "terms",
    "use_backend",
]
