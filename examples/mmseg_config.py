"""Distillation with mmsegmentation: a config for a Runner; an FCN learns from a SegFormer.

    pip install mmsegmentation "mmcv>=2.0.0,<2.2.0" ftfy regex
    python examples/mmseg_config.py

What a config file of your own needs of this: `type`, `teacher` and `teacher_checkpoint` of the
model, `loss_decode`, and custom_imports = dict(imports=["heteroakd_fast.integrations.mmseg"]).
Everything else is a small student and made-up data.
"""

from __future__ import annotations

import tempfile

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from torch.utils.data import Dataset

import heteroakd_fast.integrations.mmseg  # noqa: F401  (a config file has custom_imports)

CLASSES = 4

CONFIG = dict(
    default_scope="mmseg",
    model=dict(
        type="DistilledEncoderDecoder",  # was EncoderDecoder
        teacher=dict(
            type="EncoderDecoder",
            backbone=dict(
                type="MixVisionTransformer",
                embed_dims=8,
                num_layers=[1, 1, 1, 1],
                num_heads=[1, 1, 2, 4],
            ),
            decode_head=dict(
                type="SegformerHead",
                in_channels=[8, 8, 16, 32],
                in_index=[0, 1, 2, 3],
                channels=32,
                num_classes=CLASSES,
            ),
        ),
        teacher_checkpoint=None,  # the file or URL of your trained one
        data_preprocessor=dict(type="SegDataPreProcessor", size=(32, 32)),
        backbone=dict(
            type="ResNet",
            depth=18,
            base_channels=8,
            stem_channels=8,
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
        ),
        decode_head=dict(
            type="FCNHead",
            in_channels=64,
            channels=16,
            num_convs=1,
            num_classes=CLASSES,
            norm_cfg=dict(type="BN"),
            # was dict(type="CrossEntropyLoss", avg_non_ignore=True), which this contains
            loss_decode=dict(
                type="HeteroAKDLoss", kd_weight=0.5, temperature=2.0, avg_non_ignore=True
            ),
        ),
        auxiliary_head=dict(
            type="FCNHead",
            in_channels=32,
            in_index=2,
            channels=8,
            num_convs=1,
            num_classes=CLASSES,
            norm_cfg=dict(type="BN"),
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4, avg_non_ignore=True),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    ),
    train_dataloader=dict(
        dataset=dict(type="Patches"),
        batch_size=4,
        sampler=dict(type="InfiniteSampler", shuffle=True),
    ),
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2)),
    train_cfg=dict(by_epoch=False, max_iters=40),
    default_hooks=dict(logger=dict(type="LoggerHook", interval=4, log_metric_by_epoch=False)),
    log_level="WARNING",
)


@DATASETS.register_module()
class Patches(Dataset):
    """Patches whose colour tells the class; the first row is not labelled."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        target = torch.randint(0, CLASSES, (2, 2), generator=generator)
        target = target.repeat_interleave(16, 0).repeat_interleave(16, 1)
        colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
        images = colours[target].permute(2, 0, 1)
        target[0] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=target[None]))
        sample.set_metainfo(dict(img_shape=(32, 32), ori_shape=(32, 32), pad_shape=(32, 32)))
        return dict(inputs=images, data_samples=sample)


class Record(Hook):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        self.losses.append(outputs["loss"].item())
        if batch_idx % 10 == 9:
            print({name: round(float(value), 3) for name, value in outputs.items()})


def main() -> list[float]:
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner.from_cfg(Config(dict(CONFIG, work_dir=folder)))
        runner.register_hook(record)
        runner.train()
    print(f"loss from {record.losses[0]:.3f} to {record.losses[-1]:.3f}")
    return record.losses


if __name__ == "__main__":
    main()
