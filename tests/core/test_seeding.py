import numpy as np

from ddpm.core.seeding import derive, generator


def test_a_seed_follows_from_its_arguments_and_never_changes():
    assert derive(0, "step", 1) == 4677137154503864754
    assert derive(0, "step", 1) == derive(0, "step", 1)


def test_seeds_of_different_purposes_and_indices_differ():
    seeds = {derive(s, purpose, i) for s in (0, 1) for purpose in ("step", "sample") for i in range(2000)}
    assert len(seeds) == 8000
    assert derive(0, "step", 12) != derive(0, "step", 1, 2)


def test_neighbouring_generators_are_not_correlated():
    draws = np.stack([generator(0, "sample", i).standard_normal(256) for i in range(200)])
    correlation = np.corrcoef(draws)[np.triu_indices(200, 1)]
    assert abs(correlation).max() < 0.35
    assert abs(draws.mean()) < 0.02
