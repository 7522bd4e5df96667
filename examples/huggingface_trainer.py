"""Distillation with the Trainer of Hugging Face: a large SegFormer teaches a small one.

    pip install transformers accelerate
    python examples/huggingface_trainer.py

Replace the two configs by `SegformerForSemanticSegmentation.from_pretrained(...)`, the data by
yours. The labels go to the loss and not to the model.
"""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, TrainingArguments

from heteroakd_fast import HeteroAKDLoss
from heteroakd_fast.integrations.transformers import DistillationTrainer

CLASSES = 4


def segformer(width: int) -> SegformerForSemanticSegmentation:
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=CLASSES,
            depths=[1, 1, 1, 1],
            hidden_sizes=[width, width, 2 * width, 2 * width],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=4 * width,
        )
    )


class Patches(Dataset):
    """Patches whose colour tells the class; the first row is not labelled."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        target = torch.randint(0, CLASSES, (2, 2), generator=generator)
        target = target.repeat_interleave(16, 0).repeat_interleave(16, 1)
        colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
        images = colours[target].permute(2, 0, 1)
        target[0] = 255
        return {"pixel_values": images, "labels": target}


def main() -> list[float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            segformer(width=8),
            TrainingArguments(
                folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                num_train_epochs=3,
                learning_rate=3e-3,
                logging_steps=4,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Patches(),
            eval_dataset=Patches(),
            teacher=segformer(width=16),  # load your trained one: this knows nothing
            loss=HeteroAKDLoss(CLASSES, ignore_index=255, kd_weight=0.5, temperature=2.0),
        )
        trainer.train()
        print(trainer.evaluate())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss from {float(losses[0]):.3f} to {float(losses[-1]):.3f}")
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    main()
