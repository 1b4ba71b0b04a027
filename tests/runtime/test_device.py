import pytest
import torch

from ddpm.config.schema import Runtime, Train
from ddpm.errors import UserError
from ddpm.runtime import device
from ddpm.runtime.device import Kernels, choose_device, choose_kernels, explain_out_of_memory, peak_memory
from tests.conftest import composed

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


def runtime(device, reproducible, threads):
    return Runtime(device=device, reproducible=reproducible, threads=threads, launcher="none", processes=None)


def gpu(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Fast One")


def test_cuda_that_is_not_there_is_refused_in_one_line(monkeypatch, capsys):
    gpu(monkeypatch, False)
    with pytest.raises(UserError) as caught:
        choose_device(runtime("cuda", False, None))
    assert str(caught.value) == "params.yaml: runtime.device = 'cuda': this machine has none; use auto or cpu"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("asked", "there", "given", "name"),
    [
        ("auto", False, "cpu", "CPU, 1 thread"),
        ("cpu", False, "cpu", "CPU, 1 thread"),
        ("cpu", True, "cpu", "CPU, 1 thread"),
        ("auto", True, "cuda", "A Fast One"),
        ("cuda", True, "cuda", "A Fast One"),
    ],
)
@pytest.mark.parametrize("reproducible", [True, False])
def test_device_and_kernels_are_printed_in_one_line(monkeypatch, capsys, asked, there, given, name, reproducible):
    gpu(monkeypatch, there)
    assert choose_device(runtime(asked, reproducible, 1)) == torch.device(given)
    kernels = "reproducible" if reproducible else "fastest"
    assert capsys.readouterr() == (f"device: {name}; {kernels} kernels\n", "")


@pytest.mark.parametrize("reproducible", [True, False])
def test_only_reproducible_runs_are_held_to_exact_kernels(reproducible):
    choose_device(runtime("cpu", reproducible, 1))
    assert torch.are_deterministic_algorithms_enabled() is reproducible
    assert torch.backends.cudnn.benchmark is not reproducible
    assert torch.backends.cudnn.allow_tf32 is not reproducible
    assert torch.backends.cuda.matmul.allow_tf32 is not reproducible
    assert torch.utils.deterministic.fill_uninitialized_memory is False


def test_the_number_of_threads_is_the_one_in_the_parameters():
    choose_device(runtime("cpu", True, 3))
    assert torch.get_num_threads() == 3
    choose_device(runtime("cpu", False, None))
    assert torch.get_num_threads() == 3  # left alone


def test_the_module_computes_nothing_when_it_is_imported():
    assert not any(isinstance(value, torch.Tensor) for value in vars(device).values())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_auto_takes_no_machine_dependent_kernel_if_reproducible(monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    train, where = Train(**composed("train.channels_last=auto")["train"]), torch.device(kind)
    exact = choose_kernels(train, runtime(kind, True, 1), where, steps=10**6)
    assert exact == Kernels("fp32", torch.contiguous_format, compile=False)
    fast = choose_kernels(train, runtime(kind, False, 1), where, steps=10**6)
    assert fast.precision == ("bf16" if kind == "cuda" else "fp32")
    assert (fast.memory_format == torch.channels_last) is fast.compile is (kind == "cuda")
    assert not choose_kernels(train, runtime(kind, False, 1), where, steps=1000).compile  # over before it has paid


def test_explicit_kernel_settings_are_taken_and_printed(capsys):
    asked = {"precision": "bf16", "channels_last": True, "compile": True}
    train = Train(**composed()["train"] | asked)
    chosen = choose_kernels(train, runtime("cpu", True, 1), torch.device("cpu"), steps=1)
    assert chosen == Kernels("bf16", torch.channels_last, compile=True)
    assert capsys.readouterr().out == "training in bf16, channels last, compiled\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_out_of_memory_is_reported_with_the_settings_that_help(error):
    def allocate():
        if error:
            raise error
        torch.empty(2**60)

    with (
        pytest.raises(UserError, match=r"^out of memory: lower train.batch_size$"),
        explain_out_of_memory("lower train.batch_size"),
    ):
        allocate()


def test_other_faults_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("nothing helps"):
        raise RuntimeError("shapes do not fit")


def test_the_peak_of_memory_counts_what_was_held():
    assert peak_memory(torch.device("cpu")) > 0.05
    torch.ones(2**27)  # half a GiB
    assert 0.5 < peak_memory(torch.device("cpu")) < 64
