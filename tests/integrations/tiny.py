"""Networks, data and a plain training loop, for every trainer to be compared with."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heteroakd_fast import HeteroAKDLoss
from heteroakd_fast.integrations import logits_of

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = 5
FEATURES = ("body", "body")


class Net(nn.Module):
    """Logits at a quarter of the resolution; no layer that looks at other images of the batch,
    unless `norm`."""

    def __init__(self, width: int, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 4, 1, bias=not norm),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
        )
        self.classifier = nn.Conv2d(width, CLASSES, 1)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classifier(torch.relu(self.body(pixel_values)))}


def data(count: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images and labels; each image has its own number of ignored pixels, the first has most."""
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(count, 3, size, size, generator=generator)
    target = torch.randint(0, CLASSES, (count, size, size), generator=generator)
    for number in range(count):
        target[number, : max(0, size - 3 - 2 * number)] = 255
    return images, target


def models(norm: bool = False) -> tuple[Net, Net]:
    """A student and a teacher with a will of its own, or nothing could be seen of it."""
    torch.manual_seed(5)
    student, teacher = Net(6, norm), Net(9, norm)
    with torch.no_grad():
        teacher.classifier.weight.mul_(8.0)
    return student, teacher


def make_loss(features: bool = False, **options: Any) -> HeteroAKDLoss:
    torch.manual_seed(6)
    channels = (6, 9) if features else ()
    return HeteroAKDLoss(CLASSES, *channels, **{"kd_weight": 0.7, "temperature": 2.0, **options})


def plain_loss(
    student: nn.Module, teacher: nn.Module, loss: HeteroAKDLoss, images: Tensor, target: Tensor
) -> Any:
    """What every trainer must compute, by the plain call."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.body.register_forward_hook(lambda *a, side=side: seen.update({side: a[-1]}))
        for model, side in ((student, "student_features"), (teacher, "teacher_features"))
    ]
    logits = student(images)["logits"]
    teacher.eval()
    with torch.no_grad():
        teacher_logits = teacher(images)["logits"]
    for hook in hooks:
        hook.remove()
    if loss.student_projector is None:
        seen.clear()
    return loss(logits, target, teacher_logits=teacher_logits, **seen)


def plain_steps(
    parameters: Iterable[nn.Parameter], losses: Iterable[Callable[[], Tensor]], lr: float
) -> list[float]:
    optimizer = torch.optim.SGD(parameters, lr=lr)
    values = []
    for compute in losses:
        optimizer.zero_grad()
        value = compute()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def same_parameters(got: nn.Module, expected: nn.Module, start: nn.Module, where: str = "") -> None:
    """Equal, and not because nothing was trained."""
    for (name, a), b, c in zip(
        got.named_parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        what = f"{where} {name}"
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda m, w=what: f"{w}: {m}")
        assert not torch.equal(a, c), f"{what} was not trained"


def mean_iou(model: nn.Module, images: Tensor, target: Tensor) -> float:
    """Of the model's logits, upsampled to the labels' size; pixel sets, and no confusion matrix."""
    model.eval()
    with torch.no_grad():
        logits = logits_of(model(images))
    logits = nn.functional.interpolate(logits, size=target.shape[1:], mode="bilinear")
    predicted, valid = logits.argmax(1), target != 255
    scores = []
    for c in range(CLASSES):
        said, true = (predicted == c) & valid, target == c
        if (said | true).any():
            scores.append(float((said & true).sum() / (said | true).sum()))
    assert len(set(scores)) > 1
    return sum(scores) / len(scores)


def run_main(name: str) -> Any:
    """What the example returns."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]()


def run_example(name: str) -> None:
    losses = run_main(name)
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    assert last < 0.9 * first, losses
