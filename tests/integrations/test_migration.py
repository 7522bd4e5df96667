"""The conversions in docs/integrations.md, against the formulas they name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heteroakd_fast import functional

T, B, C, H, W = 3.0, 2, 5, 6, 4


def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    student, teacher = torch.randn(B, C, H, W), torch.randn(B, C, H, W)
    return student, teacher, torch.randint(0, C, (B, 4 * H, 4 * W))


@pytest.mark.parametrize(
    ("reduction", "squared", "kd_weight"),
    [
        ("batchmean", True, 0.3 * H * W),  # mmrazor
        ("mean", True, 0.3 / C),  # mmrazor
        ("mean", False, 0.3 / (C * T**2)),  # IFVD, TorchDistiller
    ],
)
def test_kl_divergences(reduction: str, squared: bool, kd_weight: float) -> None:
    student, teacher, target = pair()
    theirs = 0.3 * F.kl_div(
        F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction=reduction
    )
    theirs = theirs * T**2 if squared else theirs
    ours = functional.distillation_loss(
        student,
        target,
        teacher,
        ce_weight=0.0,
        kd_weight=kd_weight,
        temperature=T,
        resolution="logits",
    )
    torch.testing.assert_close(ours.loss, theirs)


def test_cirkd() -> None:
    student, teacher, target = pair()
    rows = [x.permute(0, 2, 3, 1).reshape(-1, C) / T for x in (student, teacher)]
    kd = T**2 * F.kl_div(F.log_softmax(rows[0], 1), F.softmax(rows[1], 1), reduction="batchmean")
    upsampled = F.interpolate(student, target.shape[1:], mode="bilinear", align_corners=True)
    ours = functional.distillation_loss(
        student,
        target,
        teacher,
        ce_weight=0.0,
        kd_weight=1.0,
        temperature=T,
        resolution="logits",
    )
    torch.testing.assert_close(ours.loss, kd)
    ce = functional.cross_entropy(student, target, align_corners=True)
    torch.testing.assert_close(ce.loss, F.cross_entropy(upsampled, target))


def test_the_loss_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.SegformerConfig(
        num_labels=C,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8] * 4,
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    target = torch.randint(0, C, (2, 64, 64))
    target[0, :20] = config.semantic_loss_ignore_index
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 64), labels=target)
    ours = functional.cross_entropy(
        output.logits, target, ignore_index=config.semantic_loss_ignore_index
    )
    torch.testing.assert_close(ours.loss, output.loss)


def test_cwd() -> None:
    """mmrazor's ChannelWiseDivergence, written out: T^2 / (B C) over the pixels of a channel."""
    from heteroakd_fast import ChannelWiseLoss

    student = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    tau = 3.0
    p_t = (teacher.flatten(2) / tau).softmax(2)
    log_p_s = (student.flatten(2) / tau).log_softmax(2)
    theirs = tau**2 * (p_t * (p_t.log() - log_p_s)).sum() / (2 * 5)
    target = torch.zeros(2, 24, 28, dtype=torch.int64)
    ours = ChannelWiseLoss(temperature=tau, resolution="logits")(
        student, target, teacher_logits=teacher
    ).loss
    torch.testing.assert_close(ours, theirs)
