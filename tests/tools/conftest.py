"""A repository with experiments to compare."""

from pathlib import Path

import pytest

from tests.tools.repository import Repository

A, B = (0.050, 0.051, 0.052, 0.049), (0.090, 0.094, 0.089, 0.091)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Learning rates 0.002 (main and three further seeds) and 0.02 (four seeds), one run of 0.005 with the lowest
    distance, another sampler with two seeds of its samples, another kind of prediction, and other code."""
    made = Repository(Path(tmp_path_factory.mktemp("compare") / "repository"))
    for seed in range(1, 4):
        made.experiment(f"a{seed}", {"frechet_distance": A[seed], "recall": 0.8 + seed / 100}, train__seed=seed)
    for seed in range(4):
        metrics = {"frechet_distance": B[seed], "recall": 0.8 + seed / 90, "held_out_loss": 0.2}
        made.experiment(f"b{seed}", metrics, train__seed=seed, optimizer__lr=0.02)
    made.experiment("lucky", {"frechet_distance": 0.03}, optimizer__lr=0.005)
    for seed in (1, 2):
        made.experiment(
            f"ddpm{seed}", {"frechet_distance": 0.06 + seed / 1000}, sample__sampler="ddpm", sample__seed=seed
        )
    made.experiment("eps", {"frechet_distance": 0.06, "held_out_loss": 0.05}, diffusion__prediction="epsilon")
    made.experiment("code", {"frechet_distance": 0.05}, code="2\n")
    return made
