"""A small independent classifier of real images: the judge, and the space of its features."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.train.data import ImageDataset
from flowkernels.train.files import atomic

FEATURES = 64
_EPOCHS = 12
_BATCH = 32


class Classifier(nn.Module):
    """Three convolutions, a layer of 64 features, one linear read-out.

    Args:
        channels: of the images.
        num_classes: of the read-out.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, 64], logits [B, num_classes]) of images [B, C, H, W] in [-1, 1]."""
        features = self.trunk(x)
        return features, self.head(features)

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
        """(features, predicted classes) of many images, float32 on the CPU."""
        self.eval()
        device = self.head.weight.device
        pairs = [self(part.to(device)) for part in torch.split(images, batch)]
        features = torch.cat([f for f, _ in pairs]).cpu()
        return features, torch.cat([logits for _, logits in pairs]).argmax(1).cpu()


def train_classifier(images: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> Classifier:
    """Train on real images; the same seed gives the same classifier on the same machine.

    Args:
        images: [N, C, H, W] in [-1, 1], on the CPU.
        labels: [N] int64.
        num_classes: how many there are.
        seed: of weights and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], num_classes)
        steps = _EPOCHS * -(-len(images) // _BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(_EPOCHS):
            for index in torch.split(torch.randperm(len(images)), _BATCH):
                _, logits = model(images[index])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(F.cross_entropy(logits, labels[index]))
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


def cached_classifier(folder: str | Path, dataset: ImageDataset, seed: int = 0) -> Classifier:
    """The classifier of a dataset, from `<folder>/classifier.safetensors` if it is of that data."""
    path = Path(folder) / "classifier.safetensors"
    images = dataset.images(torch.arange(len(dataset)))
    key = _key(images, dataset.labels, seed)
    model = Classifier(dataset.shape[0], len(dataset.classes))
    try:
        with safe_open(path, framework="pt") as file:
            fits = (file.metadata() or {}).get("key") == key
        if fits:
            model.load_state_dict(load_file(path))
            return model.eval().requires_grad_(False)
    except (OSError, SafetensorError, RuntimeError):
        pass  # none yet, or not of this code: train one
    model = train_classifier(images, dataset.labels, len(dataset.classes), seed)
    with atomic(path) as temporary:
        save_file(model.state_dict(), temporary, metadata={"key": key})
    return model


def _key(images: Tensor, labels: Tensor, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([seed, _EPOCHS, _BATCH, FEATURES]).encode())
    digest.update(images.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()
