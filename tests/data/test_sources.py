"""The sets that torchvision downloads, from small archives of the same layout."""

import errno
import gzip
import hashlib
import io
import pickle
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.config.schema import Dataset
from ddpm.data.sources import Source, load_source
from ddpm.errors import UserError
from tests.conftest import composed


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(name: str) -> Source:
    return load_source(Dataset(**composed(f"dataset={name}")["dataset"]), Path("downloads").resolve())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def make_cifar10(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    from torchvision.datasets import CIFAR10

    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    files = {f"data_batch_{i + 1}": {"data": pixels[2 * i : 2 * i + 2], "labels": [i, 9 - i]} for i in range(5)}
    files["test_batch"] = {"data": pixels[10:], "labels": [3, 4]}
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    dumped = {name: pickle.dumps(value) for name, value in files.items()}
    Path("downloads").mkdir()
    with tarfile.open("downloads/cifar-10-python.tar.gz", "w:gz") as archive:
        for name, data in dumped.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    sums = {name: md5(data) for name, data in dumped.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(Path("downloads/cifar-10-python.tar.gz").read_bytes()))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in sums if name.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return pixels.reshape(12, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.usefixtures("no_network")
def test_cifar10_is_read_from_its_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_cifar10(monkeypatch)
    source = load("cifar10")
    assert source.classes[3] == "class 3"
    assert np.array_equal(source.train.images, pixels[:10]) and np.array_equal(source.test.images, pixels[10:])
    assert source.train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
def test_a_damaged_unpacked_file_is_unpacked_again(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    pixels = make_cifar10(monkeypatch)
    load("cifar10")
    Path("downloads/cifar-10-batches-py", file).write_bytes(b"half")
    assert np.array_equal(load("cifar10").train.images, pixels[:10])


def make_mnist(monkeypatch: pytest.MonkeyPatch, name: str) -> np.ndarray:
    import torchvision

    pixels = np.random.default_rng(1).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    folder = Path("downloads", name, "raw")
    folder.mkdir(parents=True)
    resources = []
    for prefix, part in (("train", slice(0, 10)), ("t10k", slice(10, 12))):
        for suffix, array in (("images-idx3-ubyte", pixels[part]), ("labels-idx1-ubyte", labels[part])):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            data = gzip.compress(header + array.tobytes(), mtime=0)
            file = f"{prefix}-{suffix}.gz"
            (folder / file).write_bytes(data)
            resources.append((file, md5(data)))
    monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", resources)
    return pixels[..., None]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "cls"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_fashion_mnist_are_read_from_archives(monkeypatch: pytest.MonkeyPatch, name: str, cls: str) -> None:
    pixels = make_mnist(monkeypatch, cls)
    for _ in range(2):
        source = load(name)
        assert len(source.classes) == 10 and len(source.train.labels) == 10
        assert np.array_equal(source.train.images, pixels[:10]) and np.array_equal(source.test.images, pixels[10:])
        assert source.test.labels.tolist() == [0, 1]
        unpacked = Path("downloads", cls, "raw/train-images-idx3-ubyte")
        unpacked.write_bytes(unpacked.read_bytes()[:-1] + b"x")  # no checksum of torchvision's covers this file


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("state", ["absent", "damaged"])
@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("cifar10", "downloads", ["cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a)"]),
        ("mnist", "downloads/MNIST/raw", ["train-images-idx3-ubyte.gz (md5 f68b3c", "t10k-labels-idx1-ubyte.gz (md5 "]),
        ("fashion_mnist", "downloads/FashionMNIST/raw", ["train-images-idx3-ubyte.gz (md5 8d4fb7"]),
    ],
)
def test_without_network_the_error_names_what_to_put_where(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, folder: str, files: list[str], state: str
) -> None:
    if state == "damaged":
        Path(folder).mkdir(parents=True)
        Path(folder, files[0].split()[0]).write_bytes(b"half an archive")
    timeout = socket.getdefaulttimeout()
    with pytest.raises(UserError) as fault:
        load(name)
    message = str(fault.value)
    assert "\n" not in message and "Network is unreachable" in message
    assert all(file in message for file in files) and f"put it into {tmp_path / folder} " in message
    assert "https://" in message or "http://" in message
    assert socket.getdefaulttimeout() == timeout
    assert capfd.readouterr().err == ""
