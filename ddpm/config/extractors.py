"""The feature extractors of the evaluation: their names, and the files of their weights.

Imports neither torch nor NumPy: an unknown name, or weights that cannot be downloaded, stop the first stage, not the
one after the training.
"""

import hashlib
import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

from ddpm.config.targets import near
from ddpm.errors import UserError

TIMM = "timm:"  # the prefix of a model of the library timm
# torch-fidelity's own address; the name ends in the first digits of the file's sha256
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_NAME = INCEPTION.rpartition("/")[2]
HUB_FILE = "model.safetensors"  # of each of timm's repositories on the hub
SECONDS = 30  # without an answer from a server


@cache
def _timm() -> tuple[list[str], str] | None:
    """The names of timm's models, and the text that defines them; None where timm is not installed. Importing timm
    would take seconds, and import torch."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("models/*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.findall(r"@register_model\s+def (\w+)", text), text


def name_fault(features: str, weights: str | None) -> str | None:
    """What is wrong with `evaluate.features`, given `evaluate.weights`."""
    if not features.startswith(TIMM):
        return None
    known = _timm()
    if known is None:
        return "timm is not installed: run make repro, or pip install -r requirements.txt"
    models, text = known
    model, _, tag = features.removeprefix(TIMM).partition(".")
    if model not in models:
        hint = near(model, models) or "; python -c 'import timm; print(timm.list_pretrained())' lists them"
        return f"timm has no such model{hint}"
    if tag in text if tag else weights is not None:  # the tag alone: timm composes some full names at run time
        return None
    names = sorted(set(re.findall(rf"""['"]({model}\.[\w.-]+)['"]""", text)))
    return f"its weights are {', '.join(names) or 'not known'}; name one of them, or give a file by evaluate.weights"


def file_fault(features: str, weights: str | None) -> str | None:
    """What is wrong with the file `evaluate.weights`."""
    if weights is None:
        return None
    path, advice = Path(weights), f"give {_wanted(features)}, null to download it, or use evaluate=pixels"
    if not path.is_file():
        return f"there is no such file; {advice}"
    if features.startswith(TIMM) and not _is_safetensors(path):
        return f"is not a safetensors file; {advice}"
    if not features.startswith(TIMM) and not _is_torchs(path):
        return f"is not a file written by torch.save; {advice}"
    return None


def _wanted(features: str) -> str:
    """The file of weights that the user has to provide."""
    if features.startswith(TIMM):
        return f"the file {HUB_FILE} of huggingface.co/timm/{features.removeprefix(TIMM)}"
    return f"the file {INCEPTION_NAME} of torch-fidelity's releases"


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors, with the length of a JSON object and the object, and has their suffix:
    timm decides by the suffix whether to unpickle a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return path.suffix == ".safetensors" and file.read(1) == b"{" and length + 8 <= path.stat().st_size


def _is_torchs(path: Path) -> bool:
    """Whether a file begins like one of torch.save's: a zip archive, or before torch 1.6 a pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def fetch(features: str, weights: str | None) -> Path | None:
    """The file with the weights of an extractor, downloaded where it is not here yet; None for pixels.

    Raises:
        UserError: the file cannot be downloaded.
    """
    if features == "pixels":
        return None
    if weights is not None:
        return Path(weights)
    try:
        return _from_hub(features.removeprefix(TIMM)) if features.startswith(TIMM) else _inception()
    except OSError as error:  # of urllib and of the hub
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"params.yaml: evaluate.weights = None: the weights of {features} cannot be downloaded: {reason}; give "
            f"{_wanted(features)}, or use evaluate=pixels"
        ) from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(f"timm/{name}", HUB_FILE)
    return Path(cached if isinstance(cached, str) else hf_hub_download(f"timm/{name}", HUB_FILE))


def _inception() -> Path:
    """Inception's weights, downloaded to the place where torch.hub and torch-fidelity keep them, too."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    path = Path(home, "hub/checkpoints", Path(urlparse(INCEPTION).path).name).expanduser()
    if path.exists():
        return path
    print(f"downloading {INCEPTION} to {path}", file=sys.stderr, flush=True)
    with urlopen(INCEPTION, timeout=SECONDS) as answer:
        content = answer.read()
    if not hashlib.sha256(content).hexdigest().startswith(path.stem.rpartition("-")[2]):
        raise OSError("the checksum of the downloaded file is wrong")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path
