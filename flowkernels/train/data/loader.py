"""The loader: an endless shuffled stream of batches whose place is one number."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkernels.train.data.dataset import ImageDataset
from flowkernels.train.errors import UsageError


class Loader:
    """Deals a dataset in shuffled order, epoch after epoch, without end.

    Image number p of the stream is image `p mod N` of epoch `p div N`; the order of an epoch, and
    which of its images are mirrored, follow from (seed, epoch) alone. So a batch is a function of
    the position, the next one can be made ahead in another thread, and a resume is exact.

    Args:
        dataset: images and labels.
        batch_size: images per batch; may exceed the dataset.
        seed: seed of the order.
        device: where the batches go.
        flip: mirror half of the images, drawn anew in each epoch.
        labels: deal out the classes too.

    Example:
        >>> from flowkernels.train.data import Loader, load_digits
        >>> batch = Loader(load_digits(), batch_size=4).next_batch()
        >>> sorted(batch), tuple(batch["x0"].shape)
        (['labels', 'x0'], (4, 1, 8, 8))
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        flip: bool = False,
        labels: bool = True,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size: got {batch_size!r}, needs a whole number >= 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.flip = flip
        self.labels = labels
        self._position = 0
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def next_batch(self) -> dict[str, Tensor]:
        """The next batch: `x0` [B, C, H, W] float32 in [-1, 1], and `labels` [B] int64.

        Stored trajectories come as `trajectory` [B, S, C, H, W] instead, and are never mirrored.
        """
        position = self._position
        if self._ahead is not None and self._ahead[0] == position:
            batch = self._ahead[1].result()
        else:
            batch = self._make(position)
        self._position = position + self.batch_size
        if self._pool is None:
            # One thread for its operators, which PyTorch sets by thread: with a second team of
            # OpenMP's there would be more threads than cores, and the main team's would sleep at
            # every barrier where they now spin.
            self._pool = ThreadPoolExecutor(
                max_workers=1,
                thread_name_prefix="loader",
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
        self._ahead = (self._position, self._pool.submit(self._make, self._position))
        on_cuda = self.device.type == "cuda"
        return {key: value.to(self.device, non_blocking=on_cuda) for key, value in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, index in it, and the seed of the order."""
        epoch, index = divmod(self._position, len(self.dataset))
        return {"seed": self.seed, "epoch": epoch, "index": index, "size": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Go to a saved position, or to the next epoch where the dataset has another size now.

        Returns:
            The size that the dataset had.
        """
        size: int = state["size"]
        if self._ahead is not None:
            wait([self._ahead[1]])  # it reads the orders that are cleared below
        self._ahead = None
        self.seed = state["seed"]
        self._orders.clear()
        if size == len(self.dataset):
            self._position = state["epoch"] * size + state["index"]
        else:
            self._position = (state["epoch"] + 1) * len(self.dataset)
        return size

    def close(self) -> None:
        """Stop the thread that works ahead; the next batch starts another."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._ahead = None

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Permutation and mirror flags of one epoch."""
        if epoch not in self._orders:
            for old in [key for key in self._orders if key < epoch - 1]:
                del self._orders[old]
            # Torch's CPU generator takes 32 bits of its seed; hash both words into them.
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            generator = torch.Generator().manual_seed(seed)
            size = len(self.dataset)
            permutation = torch.randperm(size, generator=generator)
            self._orders[epoch] = permutation, torch.rand(size, generator=generator) < 0.5
        return self._orders[epoch]

    def _make(self, position: int) -> dict[str, Tensor]:
        indices, mirrored = [], []
        needed = self.batch_size
        while needed:
            epoch, start = divmod(position, len(self.dataset))
            permutation, mirror = self._order(epoch)
            indices.append(permutation[start : start + needed])
            mirrored.append(mirror[start : start + needed])
            taken = len(indices[-1])
            needed -= taken
            position += taken
        index = torch.cat(indices)
        images = self.dataset.images(index)
        key = getattr(self.dataset, "key", "x0")
        if self.flip and key == "x0":
            images = torch.where(torch.cat(mirrored).view(-1, 1, 1, 1), images.flip(-1), images)
        batch = {key: images}
        if self.labels:
            batch["labels"] = self.dataset.labels[index]
        if self.device.type == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return batch
