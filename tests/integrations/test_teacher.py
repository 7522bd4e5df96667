"""What the drop-ins share, and what needs no library: the teacher, taps, errors, imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from heteroakd_fast.integrations import FeatureTap, FrozenTeacher, logits_of
from heteroakd_fast.integrations.smp import DistillationLoss, low_resolution

LIBRARIES = ("lightning", "pytorch_lightning", "transformers", "accelerate", "mmengine", "mmseg")
LIBRARIES += ("segmentation_models_pytorch",)


def test_the_package_imports_none_of_the_libraries() -> None:
    code = (
        "import sys, heteroakd_fast, heteroakd_fast.integrations, heteroakd_fast.integrations.smp\n"
        f"print([name for name in {LIBRARIES} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "absent", "command"),
    [
        ("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "transformers accelerate"),
        ("mmseg", ["mmengine", "mmengine.registry"], "mmengine"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    module: str, absent: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail
    name = f"heteroakd_fast.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"integrations.{module} needs .* pip install {command}$"):
        importlib.import_module(name)


def test_the_teacher_stays_as_it_is() -> None:
    _, net = tiny.models(norm=True)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    teacher = FrozenTeacher(net, feature="body")
    net.train()  # somebody else holds it
    found = teacher(tiny.data()[0].requires_grad_())
    assert set(found) == {"teacher_logits", "teacher_features"}
    assert found["teacher_features"].shape == (8, 9, 4, 4)
    assert not any(value.requires_grad for value in found.values())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name

    holder = nn.Module()
    holder.teacher = teacher
    assert not list(holder.parameters())
    assert not holder.state_dict()


def test_the_teacher_follows_its_input() -> None:
    class Where(nn.Module):
        moved_to = None

        def to(self, device: torch.device) -> Where:  # type: ignore[override]
            self.moved_to = device
            return self

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    net = Where()
    net.weight = nn.Parameter(torch.zeros(1))
    teacher = FrozenTeacher(net)
    teacher(torch.zeros(1, 2, 3, 3))
    assert net.moved_to is None
    teacher(torch.zeros(1, 2, 3, 3, device="meta"))
    assert net.moved_to == torch.device("meta")


def test_logits_are_found() -> None:
    logits = torch.zeros(1, 2, 3, 3)

    class Output:
        pass

    output = Output()
    output.logits = logits
    for found in (logits, output, {"logits": logits}, {"out": logits, "aux": 1}, (logits, 2)):
        assert logits_of(found) is logits
    with pytest.raises(TypeError, match="logits: the model returned a str"):
        logits_of("no")


def test_taps() -> None:
    student, _ = tiny.models()
    with pytest.raises(ValueError, match="feature: got 'bodi', Net has no such module; near names"):
        FeatureTap(student, "bodi")
    tap = FeatureTap(student, "body.0")
    with tap.listening():
        student(tiny.data()[0])
        assert tap.take().requires_grad
        with pytest.raises(RuntimeError, match="did not run"):
            tap.take()
    student(tiny.data()[0])
    with pytest.raises(RuntimeError, match="did not run"):  # nothing is kept outside
        tap.take()
    assert not student.body[0]._forward_hooks


def test_a_copied_lightning_module_shares_its_group(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="pip install lightning")
    from heteroakd_fast.integrations.lightning import DistillationModule

    student, teacher = tiny.models()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        module = DistillationModule(
            student, teacher, tiny.make_loss(), torch.optim.SGD, process_group=group
        )
        assert AveragedModel(module).module.process_group is group
        assert module.process_group is group
    finally:
        dist.destroy_process_group()


def test_smp_loss_refuses_what_it_cannot_do() -> None:
    for mode in ("binary", "multilabel"):
        with pytest.raises(
            ValueError, match=f"mode: got '{mode}', expected 'multiclass': the loss"
        ):
            DistillationLoss(mode, 5)
    with pytest.raises(ValueError, match="mode: got 'multi', expected 'multiclass'"):
        DistillationLoss("multi", 5)
    with pytest.raises(ValueError, match="from_logits: got False, expected True"):
        DistillationLoss("multiclass", 5, from_logits=False)
    with pytest.raises(ValueError, match="label_smoothing: is called smooth_factor here"):
        DistillationLoss("multiclass", 5, label_smoothing=0.1)
    refused = pytest.raises(ValueError, match="models.0.: Net has no segmentation_head")
    with refused, low_resolution(tiny.models()[0]):
        pass


def test_smp_loss_is_the_plain_loss() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 8, 8)
    target = torch.randint(0, 5, (2, 16, 16))
    ours = DistillationLoss("multiclass", 5, smooth_factor=0.1, kd_weight=0.5)
    loss = ours(student, target[:, None], teacher)
    (grad,) = torch.autograd.grad(loss, student)
    expected = tiny.make_loss(
        label_smoothing=0.1, kd_weight=0.5, temperature=1.0, align_corners=True
    )
    plain = expected(student, target, teacher_logits=teacher)
    assert loss == plain.loss
    assert torch.equal(grad, torch.autograd.grad(plain.loss, student)[0])
    assert ours.terms is not None
    assert ours.terms.kd == plain.kd
    assert not ours.terms.loss.requires_grad
