import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm.evaluation import blocks
from ddpm.evaluation.blocks import products, square_norms, tiles
from ddpm.evaluation.distances import CPU
from tests.evaluation.known import gaussian, pixels


def held() -> int:
    """The memory of this process in MiB, without the pages of files."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the count of memory is Linux's")
def test_no_block_leaves_memory_behind(tmp_path: Path) -> None:
    """Pixels of 32x32 colour images: blocks of a little less than 32 MiB once left 20 MiB each."""
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(15_000, 3072))
    before = held()
    square_norms(images, CPU)
    products(images[:20], images, CPU)
    assert held() - before < 200


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the count of memory is Linux's")
def test_no_tile_leaves_memory_behind(tmp_path: Path) -> None:
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(12_000, 200))
    before = held()
    for _ in tiles(images[:1000], images, CPU, "pairs"):
        assert held() - before < 150


@pytest.mark.parametrize("counts", [(1, 1), (5, 12), (8, 4), (12, 1), (13, 13)])
def test_the_tiles_are_all_pairs_once(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]) -> None:
    monkeypatch.setattr(blocks, "TILE", 4)
    a, b = pixels(counts[0]), pixels(counts[1], seed=1)
    found = np.zeros(counts)
    for rows, columns, inner in tiles(a, b, CPU, "pairs"):
        found[rows, columns] += inner.numpy()
    np.testing.assert_array_equal(found, a.astype(float) @ b.T.astype(float))


@pytest.mark.parametrize("count", [1, 4, 13])
def test_the_tiles_of_one_set_are_the_pairs_of_two_images_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(blocks, "TILE", 4)
    a = pixels(count)
    found = np.zeros((count, count))
    for rows, columns, inner in tiles(a, None, CPU, "pairs"):
        found[rows, columns] += inner.numpy()
        if rows != columns:
            found[columns, rows] += inner.numpy().T
    np.testing.assert_array_equal(found, a.astype(float) @ a.T.astype(float))


@pytest.mark.parametrize("block", [1, 100, 2000])
def test_products_do_not_depend_on_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    a, b = gaussian(30), gaussian(50, seed=1)
    monkeypatch.setattr(blocks, "BLOCK", block)
    np.testing.assert_allclose(products(a, b, CPU).numpy(), a @ b.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_the_progress_counts_pairs_and_moves_with_each_tile(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    bars = []

    class Bar(blocks.Progress):
        def __init__(self, total: int, name: str, unit: str) -> None:
            super().__init__(total, name, unit)
            self.moves: list[float] = []
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            self.moves.append(n or 0)
            return super().update(n)

    monkeypatch.setattr(blocks, "Progress", Bar)
    monkeypatch.setattr(blocks, "TILE", 10)
    for _ in tiles(pixels(25), None if own else pixels(41), CPU, "pairs of images"):
        pass
    [bar] = bars
    assert (bar.desc, bar.unit) == ("pairs of images", "pair")
    assert bar.n == bar.total == (10 * 10 + 10 * 20 + 5 * 25 if own else 25 * 41)
    assert len(bar.moves) == (6 if own else 15)
