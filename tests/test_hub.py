"""The documents' commands for the Hugging Face Hub: diffusers uploads a folder that loads, with the same weights."""

import re
import shutil
from pathlib import Path

import torch

from ddpm.core.diffusion import DiffusionConfig
from ddpm.model_folder import load_model, save_model
from tests.conftest import ROOT, small_unet


def test_push_to_hub_uploads_a_model_that_loads(tmp_path, monkeypatch):
    """Everything but the network, which is replaced where diffusers hands the folder over."""
    from diffusers.utils import hub_utils

    uploaded = {}

    def upload(*, repo_id: str, folder_path: str, **options: object) -> None:
        uploaded[repo_id] = shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **options: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *arguments, **options: None)
    monkeypatch.setattr(
        hub_utils, "populate_model_card", lambda card: type("Card", (), {"save": lambda self, path: None})()
    )
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.chdir(tmp_path)
    unet = small_unet()
    save_model("models/ddpm", unet, DiffusionConfig(timesteps=20, schedule="cosine", prediction="v"), {})
    page = (ROOT / "docs/sharing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(code.replace("<you>/<name>", "me/digits"), {})
    assert list(uploaded) == ["me/digits"]
    loaded = load_model(Path(uploaded["me/digits"]))
    assert loaded.diffusion.prediction == "v"
    for name, value in unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value), name
