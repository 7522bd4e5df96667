"""Drop-ins for the trainers that people already have, one module per library.

    heteroakd_fast.integrations.lightning      DistillationModule
    heteroakd_fast.integrations.transformers   DistillationTrainer
    heteroakd_fast.integrations.mmseg          HeteroAKDLoss and DistilledEncoderDecoder in MODELS
    heteroakd_fast.integrations.smp            DistillationLoss, low_resolution

What is imported here needs torch only, for loops of one's own: `FrozenTeacher`, `FeatureTap`,
`Feature`, `logits_of` and, for networks of transformers, `low_resolution`. How each library's
arguments map to ours: `docs/integrations.md`.
"""

from .resolution import low_resolution
from .taps import Feature, FeatureTap
from .teacher import FrozenTeacher, logits_of

__all__ = ["Feature", "FeatureTap", "FrozenTeacher", "logits_of", "low_resolution"]
