import inspect
import sysconfig

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


def test_missing_cuda_is_refused_in_one_line(monkeypatch, capsys):
    gpu(monkeypatch, False)
    with pytest.raises(UserError) as caught:
        choose_device(runtime("cuda", False, None))
    assert str(caught.value) == "params.yaml: runtime.device = 'cuda': this machine has no CUDA device; use auto or cpu"
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
    monkeypatch.setattr(device, "compile_fault", lambda _: None)
    train, where = Train(**composed("train.channels_last=auto")["train"]), torch.device(kind)
    exact = choose_kernels(train, runtime(kind, True, 1), where, steps=10**6)
    assert exact == Kernels("fp32", torch.contiguous_format, compile=False)
    fast = choose_kernels(train, runtime(kind, False, 1), where, steps=10**6)
    assert fast.precision == ("bf16" if kind == "cuda" else "fp32")
    assert (fast.memory_format == torch.channels_last) is fast.compile is (kind == "cuda")
    assert not choose_kernels(train, runtime(kind, False, 1), where, steps=1000).compile  # too short to be worth it


@pytest.mark.parametrize(("kind", "has_bf16", "taken"), [
    ("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16"),  # the last: T4, P100, V100
])  # fmt: skip
def test_auto_takes_fp16_where_a_gpu_has_no_bf16(monkeypatch, kind, has_bf16, taken):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    train = Train(**composed()["train"])
    assert choose_kernels(train, runtime(kind, False, 1), torch.device(kind), steps=1).precision == taken


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A machine with a GPU, a C compiler, a C++ compiler and Python's headers, and no more."""
    for name in ("gcc", "g++", "headers/Python.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "headers")})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(device, "find_spec", lambda _: object())
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "missing", "fault"),
    [
        ("cuda", "gcc", "gcc or clang is not installed; apt-get install gcc"),
        ("cuda", "headers/Python.h", "/headers/Python.h is missing; apt-get install python3-dev"),
        ("cpu", "g++", "g++ is not installed; apt-get install g++"),
        ("cpu", "headers/Python.h", "/headers/Python.h is missing"),
    ],
)
def test_a_missing_compiler_is_reported_before_the_first_step(compiler, capsys, kind, missing, fault):
    train, where = Train(**composed()["train"] | {"compile": True}), torch.device(kind)
    assert choose_kernels(train, runtime(kind, True, 1), where, steps=1).compile
    (compiler / missing).unlink()
    with pytest.raises(UserError, match=r"^params.yaml: train.compile = true: .*; or set it to false$") as caught:
        choose_kernels(train, runtime(kind, True, 1), where, steps=1)
    assert fault in str(caught.value)
    capsys.readouterr()
    auto = train.model_copy(update={"compile": "auto", "precision": "fp32"})
    assert not choose_kernels(auto, runtime(kind, False, 1), where, steps=10**6).compile
    out = capsys.readouterr().out
    assert (f"train.compile = auto: not compiled: {device.compile_fault(where)}\n" in out) is (kind == "cuda")
    assert ", not compiled\n" in out


def test_the_compiler_in_cc_is_looked_for(compiler, monkeypatch):
    monkeypatch.setenv("CC", "icx")
    assert str(device.compile_fault(torch.device("cuda"))).startswith("CC = 'icx' is not a program")
    (compiler / "icx").touch(mode=0o755)
    (compiler / "gcc").unlink()
    assert device.compile_fault(torch.device("cuda")) is None


def test_compiling_needs_triton_and_a_gpu_that_it_supports(compiler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 0))
    assert "compute capability 7.0" in str(device.compile_fault(torch.device("cuda")))
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    assert "Triton is not installed" in str(device.compile_fault(torch.device("cuda")))


def test_triton_looks_for_the_compilers_that_are_checked():
    build = pytest.importorskip("triton.runtime.build")
    text = inspect.getsource(build)
    assert all(name in text for name in ('"CC"', '"gcc"', '"clang"', "posix_prefix", '["include"]'))


def test_explicit_kernel_settings_are_used_and_printed(capsys):
    asked = {"precision": "bf16", "channels_last": True, "compile": True}
    train = Train(**composed()["train"] | asked)
    chosen = choose_kernels(train, runtime("cpu", True, 1), torch.device("cpu"), steps=1)
    assert chosen == Kernels("bf16", torch.channels_last, compile=True)
    assert capsys.readouterr().out == "training in bf16, channels last, compiled\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        MemoryError("Unable to allocate 8.00 EiB for an array"),
        None,
    ],
)
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


@pytest.mark.heavy
def test_peak_memory_includes_memory_that_was_freed():
    assert peak_memory(torch.device("cpu")) > 0.05
    torch.ones(2**27)  # half a GiB
    assert 0.5 < peak_memory(torch.device("cpu")) < 64
