"""Datasets and the loader: values, order, position, damage."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowkernels.train.config import DataConfig
from flowkernels.train.data import FolderDataset, Loader, load_cifar10, load_dataset, load_digits
from flowkernels.train.data.cifar import RestrictedUnpickler
from flowkernels.train.errors import DataError, UsageError

# ---- digits and the loader -----------------------------------------------------------------------


def test_digits_are_scaled_and_split() -> None:
    everything, train, test = (load_digits(split) for split in ("all", "train", "test"))
    assert (len(everything), len(train), len(test)) == (1797, 1438, 359)
    images = everything.images(torch.arange(1797))
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert everything.labels.unique().tolist() == list(range(10))
    assert torch.equal(test.images(torch.tensor([0])), everything.images(torch.tensor([4])))


def test_loader_shows_every_image_once_per_epoch() -> None:
    dataset = load_digits("test")
    loader = Loader(dataset, batch_size=100, seed=1)
    shown = torch.cat([loader.next_batch()["x0"] for _ in range(18)])[: 5 * 359]
    for epoch in shown.split(359):
        key = {image.numpy().tobytes() for image in epoch}
        assert key == {image.numpy().tobytes() for image in dataset.images(torch.arange(359))}
    first, second = shown[:359], shown[359:718]
    assert not torch.equal(first, second)  # another order


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.integers(0, 12), st.integers(1, 6), st.booleans())
def test_loader_resumes_at_any_position(batch: int, before: int, after: int, flip: bool) -> None:
    dataset = load_digits("test")
    one = Loader(dataset, batch, seed=3, flip=flip)
    for _ in range(before):
        one.next_batch()
    state = one.state_dict()
    two = Loader(dataset, batch, seed=99, flip=flip)
    two.next_batch()
    two.load_state_dict(state)
    for _ in range(after):
        ours, theirs = one.next_batch(), two.next_batch()
        assert torch.equal(ours["x0"], theirs["x0"])
        assert torch.equal(ours["labels"], theirs["labels"])
    for loader in (one, two):
        loader.close()


def test_loader_order_depends_on_the_whole_seed() -> None:
    orders = [Loader(load_digits(), 16, seed).next_batch()["x0"] for seed in (0, 1, 2**32)]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_loader_mirrors_about_half() -> None:
    dataset = load_digits()
    plain = Loader(dataset, 1797, seed=0).next_batch()["x0"]
    mirrored = Loader(dataset, 1797, seed=0, flip=True).next_batch()["x0"]
    same = (plain == mirrored).flatten(1).all(1)
    assert torch.equal(mirrored[~same], plain[~same].flip(-1))
    # 1,797 fair coins: 0.5 ± 5 standard deviations of 0.012.
    assert 0.44 < same.double().mean() < 0.56


def test_loader_without_labels() -> None:
    assert list(Loader(load_digits(), 4, labels=False).next_batch()) == ["x0"]


def test_loader_works_ahead_on_one_thread_and_leaves_the_others_to_training() -> None:
    before = torch.get_num_threads()
    loader = Loader(load_digits(), 4)
    loader.next_batch()
    assert loader._pool is not None
    assert loader._pool.submit(torch.get_num_threads).result() == 1
    loader.close()
    assert torch.get_num_threads() == before


def test_loader_of_another_size_begins_the_next_epoch() -> None:
    state = Loader(load_digits("train"), 4).state_dict() | {"epoch": 2, "index": 7}
    loader = Loader(load_digits("test"), 4)
    assert loader.load_state_dict(state) == 1438
    assert loader.state_dict() == {"seed": 0, "epoch": 3, "index": 0, "size": 359}


# ---- image folder --------------------------------------------------------------------------------


def picture(path: Path, width: int, height: int, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "dogs" / "a.png", 20, 10, (255, 255, 255))
    picture(tmp_path / "dogs" / "deep" / "b.jpg", 9, 31, (0, 0, 0))
    picture(tmp_path / "cats" / "c.png", 8, 8, (255, 0, 0))
    (tmp_path / "cats" / "notes.txt").write_text("not a picture")
    return tmp_path


def test_folder_classes_sizes_and_values(folder: Path) -> None:
    config = DataConfig(kind="folder", path=str(folder), image_size=6)
    dataset = load_dataset(config)
    assert dataset.classes == ("cats", "dogs")
    assert dataset.labels.tolist() == [0, 1, 1]
    images = dataset.images(torch.arange(3))
    assert images.shape == (3, 3, 6, 6)
    expected = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 6, 6)
    assert torch.equal(images[0], expected)  # pure red
    assert torch.equal(images[1], torch.ones(3, 6, 6))
    assert FolderDataset(folder, 6, channels=1).images(torch.tensor([1])).shape == (1, 1, 6, 6)


def test_folder_passes_over_what_is_no_picture(folder: Path) -> None:
    dogs = folder / "dogs"
    (dogs / "._a.png").write_bytes(b"AppleDouble")
    picture(dogs / ".thumbnails" / "a.png", 4, 4, (9, 9, 9))
    (dogs / "album.png").mkdir()
    (dogs / "gone.png").symlink_to(dogs / "nowhere.png")
    assert [path.name for path in FolderDataset(folder, 6).paths] == ["c.png", "a.png", "b.jpg"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_folder_reads_sixteen_bits(tmp_path: Path, suffix: str, channels: int) -> None:
    (tmp_path / "a").mkdir()
    levels = np.full((4, 4), 0x4000, np.uint16)
    Image.fromarray(levels).save(tmp_path / "a" / f"quarter.{suffix}")
    image = FolderDataset(tmp_path, 4, channels).images(torch.tensor([0]))
    grey = torch.full((1, channels, 4, 4), 64.0) * (2.0 / 255.0) - 1.0
    assert torch.equal(image, grey)


def test_folder_refuses_wider_pictures_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 0.25, np.float32)).save(tmp_path / "a" / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: mode F of 32 bits, needs 8 or 16"):
        FolderDataset(tmp_path, 4).images(torch.tensor([0]))


def test_folder_turns_pictures_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "a" / "turned.png", exif=exif)
    image = FolderDataset(tmp_path, 8, channels=1).images(torch.tensor([0]))[0, 0]
    assert image[:4].eq(1).all()
    assert image[4:].eq(-1).all()


def test_a_home_that_is_nobodys(tmp_path: Path) -> None:
    for load in (lambda path: FolderDataset(path, 4), load_cifar10):
        with pytest.raises(DataError, match="no-such-user"):
            load("~no-such-user/pictures")


def test_folder_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255  # the middle third is white
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels).save(tmp_path / "x" / "a.png")
    assert torch.equal(FolderDataset(tmp_path, 4).images(torch.tensor([0])), torch.ones(1, 3, 4, 4))


def test_folder_faults_name_the_path(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        FolderDataset(folder / "nowhere", 8)
    with pytest.raises(DataError, match="deep: no sub-folders"):
        FolderDataset(folder / "dogs" / "deep", 8)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures"):
        FolderDataset(folder, 8)
    (folder / "empty" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    dataset = FolderDataset(folder, 8)
    with pytest.raises(DataError, match=r"bad\.png: cannot be decoded") as failure:
        Loader(dataset, len(dataset)).next_batch()
    assert "\n" not in str(failure.value)


# ---- CIFAR-10 ------------------------------------------------------------------------------------


def part(count: int, seed: int) -> dict[bytes, Any]:
    random = np.random.default_rng(seed)
    return {
        b"data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"labels": random.integers(0, 10, count).tolist(),
        b"filenames": [b"x.png"] * count,
    }


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    for i in range(1, 6):
        (inner / f"data_batch_{i}").write_bytes(pickle.dumps(part(4, i), protocol=2))
    (inner / "test_batch").write_bytes(pickle.dumps(part(3, 0), protocol=2))
    return tmp_path


def pack(folder: Path) -> Path:
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    return archive


def test_cifar_folder_and_archive_agree(cifar: Path) -> None:
    ways = [cifar, cifar / "cifar-10-batches-py", pack(cifar)]
    for split, count in (("train", 20), ("test", 3), ("all", 23)):
        sets = [load_cifar10(way, split) for way in ways]
        for dataset in sets:
            assert len(dataset) == count
            assert dataset.shape == (3, 32, 32)
            assert torch.equal(dataset.labels, sets[0].labels)
            index = torch.arange(count)
            assert torch.equal(dataset.images(index), sets[0].images(index))
    raw = part(3, 0)
    dataset = load_cifar10(cifar, "test")
    # Planes of red, green, blue, row by row.
    expected = torch.from_numpy(raw[b"data"].reshape(3, 3, 32, 32)).float() * (2 / 255) - 1
    assert torch.equal(dataset.images(torch.arange(3)), expected)
    assert dataset.labels.tolist() == raw[b"labels"]


def test_cifar_genuine_pickles_are_read(cifar: Path) -> None:
    """The genuine files were written by Python 2, with numpy.core names and bytes as str."""
    data = bytes(range(256)) * 12
    stream = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
        b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + data
        + b"tbU\x06labelsq\x08]q\x09K\x07au."
    )
    inner = cifar / "cifar-10-batches-py"
    (inner / "test_batch").write_bytes(stream)
    dataset = load_cifar10(cifar, "test")
    assert dataset.labels.tolist() == [7]
    levels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(1, 3, 32, 32)
    assert torch.equal(dataset.images(torch.tensor([0])), levels.float() * (2 / 255) - 1)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    "payload",
    [
        Evil(),
        {b"data": Evil(), b"labels": []},
        eval,
        np.array([Evil()], dtype=object),
        np.zeros(3),
        complex(1, 2),
    ],
    ids=["call", "nested call", "builtin", "object array", "float array", "other class"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_restricted_unpickler_refuses_code(
    payload: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = pickle.dumps(payload, protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
    assert not (tmp_path / "owned").exists()


def test_cifar_faults_name_the_file(cifar: Path) -> None:
    inner = cifar / "cifar-10-batches-py"
    with pytest.raises(DataError, match=r"nothing\.tar\.gz: no such CIFAR-10"):
        load_cifar10(cifar / "nothing.tar.gz")
    whole = (inner / "data_batch_3").read_bytes()
    for damage in (whole[:100], b"", b"junk", pickle.dumps([1, 2]), pickle.dumps({b"data": 1})):
        (inner / "data_batch_3").write_bytes(damage)
        with pytest.raises(DataError, match="data_batch_3: not a CIFAR-10 part") as failure:
            load_cifar10(cifar)
        assert "\n" not in str(failure.value)
    (inner / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3: cannot be read: No such file"):
        load_cifar10(cifar)
    archive = pack(cifar)
    with pytest.raises(DataError, match="data_batch_3 is missing from the archive"):
        load_cifar10(archive)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match=r"tar\.gz: not a readable tar archive"):
        load_cifar10(archive)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "folder"}, "data.path: got None, needs the local path"),
        ({"kind": "folder", "path": "x"}, "data.image_size: got None, needs a side in pixels"),
        ({"kind": "digits", "path": "x"}, "data.path: got 'x', needs no value"),
        ({"kind": "cifar10", "path": "x", "image_size": 8}, "data.image_size: got 8"),
    ],
)
def test_data_settings_that_do_not_fit(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(DataConfig(**settings_))
