"""The notebook of the documents opens a model folder, draws samples and plots them, with the core alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.config.schema import Sample
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.model_folder import load_model, save_model
from ddpm.sampling import Classes, draw
from tests.conftest import ROOT, composed, small_unet

CELLS = json.loads((ROOT / "docs/model.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SHOW = """
grid(images, columns=8).save("grid.png")
np.save("images.npy", images)
import sys
print(sorted(name for name in sys.modules if name.startswith("ddpm.") and not name.startswith("ddpm.core")))
"""


def test_the_notebook_is_committed_without_outputs():
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.process
@pytest.mark.parametrize("classes", [(), ("cat", "dog")])
def test_the_notebook_draws_the_stages_samples_by_the_core_alone(tmp_path: Path, classes: tuple[str, ...]):
    diffusion = DiffusionConfig(timesteps=20, schedule="cosine", prediction="v")
    unet = small_unet(num_class_embeds=3, has_no_label=True) if classes else small_unet()
    save_model(tmp_path / "models/ddpm", unet, diffusion, {}, classes)
    (tmp_path / "docs").mkdir()
    code = "\n".join(CODE).replace("STEPS, SEED = 16, 50", "STEPS, SEED = 16, 5") + SHOW
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "docs",
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    params = composed("sample=ddim", "sample.count=16", "sample.steps=5", "diffusion.timesteps=20")["sample"]
    model = load_model(tmp_path / "models/ddpm")
    stage = draw(model.unet, GaussianDiffusion(diffusion), Sample.model_validate(params), Classes(model.classes))
    drawn = np.load(tmp_path / "docs/images.npy")
    assert np.abs(drawn.astype(int) - stage.astype(int)).max() <= 1
    with Image.open(tmp_path / "docs/grid.png") as picture:
        assert picture.size == (64, 16)
