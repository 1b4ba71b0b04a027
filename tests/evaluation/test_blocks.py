import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm.evaluation.blocks import products, square_norms
from ddpm.evaluation.distances import CPU


@pytest.mark.skipif(sys.platform != "linux", reason="the count of memory is Linux's")
def test_no_block_leaves_memory_behind(tmp_path: Path) -> None:
    """Pixels of 32x32 colour images: blocks of a little less than 32 MiB once left 20 MiB each."""

    def held() -> int:  # MiB, without the pages of files
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(15_000, 3072))
    before = held()
    square_norms(images, CPU)
    products(images[:20], images, CPU)
    assert held() - before < 200
