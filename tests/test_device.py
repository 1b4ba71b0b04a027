import pytest
import torch

from ddpm import device
from ddpm.config import Runtime
from ddpm.device import choose_device
from ddpm.errors import UserError

SWITCHES = (
    (torch.utils.deterministic, "fill_uninitialized_memory"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
)


@pytest.fixture(autouse=True)
def switches_come_back():
    values = [getattr(owner, name) for owner, name in SWITCHES]
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    for (owner, name), value in zip(SWITCHES, values, strict=True):
        setattr(owner, name, value)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


def gpu(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Fast One")


def test_cuda_that_is_not_there_is_refused_in_one_line(monkeypatch, capsys):
    gpu(monkeypatch, False)
    with pytest.raises(UserError) as caught:
        choose_device(Runtime(device="cuda", reproducible=False, threads=None))
    assert str(caught.value) == "params.yaml: runtime.device = 'cuda': this machine has none; use auto or cpu"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("asked", "there", "given", "name"),
    [
        ("auto", False, "cpu", "CPU, 1 threads"),
        ("cpu", False, "cpu", "CPU, 1 threads"),
        ("cpu", True, "cpu", "CPU, 1 threads"),
        ("auto", True, "cuda", "A Fast One"),
        ("cuda", True, "cuda", "A Fast One"),
    ],
)
@pytest.mark.parametrize("reproducible", [True, False])
def test_the_device_and_its_kernels_are_told_in_one_line(monkeypatch, capsys, asked, there, given, name, reproducible):
    gpu(monkeypatch, there)
    assert choose_device(Runtime(device=asked, reproducible=reproducible, threads=1)) == torch.device(given)
    kernels = "reproducible" if reproducible else "fastest"
    assert capsys.readouterr() == (f"device: {name}; {kernels} kernels\n", "")


@pytest.mark.parametrize("reproducible", [True, False])
def test_only_reproducible_runs_are_held_to_exact_kernels(reproducible):
    choose_device(Runtime(device="cpu", reproducible=reproducible, threads=1))
    assert torch.are_deterministic_algorithms_enabled() is reproducible
    assert torch.backends.cudnn.benchmark is not reproducible
    assert torch.backends.cudnn.allow_tf32 is not reproducible
    assert torch.backends.cuda.matmul.allow_tf32 is not reproducible
    assert torch.utils.deterministic.fill_uninitialized_memory is False


def test_the_number_of_threads_is_the_one_that_was_asked_for():
    choose_device(Runtime(device="cpu", reproducible=True, threads=3))
    assert torch.get_num_threads() == 3
    choose_device(Runtime(device="cpu", reproducible=False, threads=None))
    assert torch.get_num_threads() == 3  # left alone


def test_the_module_computes_nothing_when_it_is_imported():
    assert not any(isinstance(value, torch.Tensor) for value in vars(device).values())
