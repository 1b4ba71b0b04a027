"""A GPU that is not there: tensors that claim to be on it and are computed on the CPU, through all of a training.

torch's FakeTensorMode has CUDA tensors on a machine without a GPU, but neither values nor a backward pass, for which
autograd asks the driver for a device thread. A second accelerator by PrivateUse1 would stay registered in the process
of the tests. Here a tensor on the GPU is a subclass of `Tensor` that holds one of the CPU. To autograd it is on the
device `meta`, whose backward pass runs in the caller's thread; to Python it is on `cuda:0`. Each operation, of the
backward pass too, passes through `Gpu`, which refuses tensors of both devices, as a GPU does. Not reached: the casts of
autocast, for which C++ asks the tensor (tests/test_gpu.py has them by FakeTensorMode), NCCL, and CUDA's own kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
ops = torch.ops.aten
COPIES = (ops._to_copy.default, ops.copy_.default)
READS = {  # operations that wait for the GPU, to know a value or a shape
    ops._local_scalar_dense.default,
    ops.nonzero.default,
    ops.masked_select.default,
    ops.equal.default,
    ops.is_nonzero.default,
    ops._unique2.default,
    ops.unique_dim.default,
    ops.repeat_interleave.Tensor,
    ops.bincount.default,
}


class WrongDeviceError(RuntimeError):
    """An operation on tensors of the GPU and of the CPU."""


class OnGpu(Tensor):
    """A tensor on the GPU that is not there; its values are in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the GPU that is not there, outside of it")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # which is read back with map_location="cpu"

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnGpu({self.held!r})"


class Gpu(TorchDispatchMode):
    """Runs every operation: on the CPU what the GPU would do, and refuses what it would not.

    Attributes:
        waits: where the CPU has waited for the GPU so far: operations, and copies that are not asynchronous.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there: list[OnGpu] = []
        here: list[Tensor] = []
        given, named = _held(args, there, here), {k: _held(x, there, here) for k, x in (kwargs or {}).items()}
        onto = bool(there)
        if (asked := named.get("device")) is not None:
            onto = torch.device(asked).type in ("cuda", "meta")
            named["device"] = torch.device("cpu")
        # a GPU takes a number from the CPU beside its own tensors
        if there and func not in COPIES and any(x.ndim for x in here):
            raise WrongDeviceError(f"{func}: tensors on cuda:0 and on cpu: {[tuple(x.shape) for x in here]}")
        if there or onto:
            self._count_waits(func, given, named, there, here, onto)
        out = func(*given, **named)
        # what was changed in place is given back
        return _placed(out, {id(x.held): x for x in there}) if onto else out

    def _count_waits(
        self, func: Any, args: Any, kwargs: dict[str, Any], there: list[OnGpu], here: list[Tensor], onto: bool
    ) -> None:
        by_mask = func.overloadpacket in (ops.index, ops.index_put_, ops.index_put) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        moved = func is ops._to_copy.default and bool(there) != onto
        pinned = onto and moved and kwargs.get("non_blocking") and getattr(here[0], "pinned", False)
        if func in READS or by_mask or (moved and not pinned) or (func is ops.copy_.default and there and here):
            self.waits.append(str(func))


def _held(x: Any, there: list[OnGpu], here: list[Tensor]) -> Any:
    """The argument of an operation with the CPU's tensors in it; adds the tensors to the lists of their device."""
    if isinstance(x, OnGpu):
        there.append(x)
        return x.held
    if isinstance(x, Tensor):
        here.append(x)
    return type(x)([_held(one, there, here) for one in x]) if type(x) in (list, tuple) else x


def _placed(x: Any, own: dict[int, OnGpu]) -> Any:
    """The result of an operation on the GPU."""
    if isinstance(x, Tensor):
        return own[id(x)] if id(x) in own else OnGpu(x)
    return type(x)([_placed(one, own) for one in x]) if type(x) in (list, tuple) else x


def _pinned(self: Tensor, *_: Any) -> Tensor:
    copy = self.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """A machine with a GPU, for what is called in this context."""
    with pytest.MonkeyPatch.context() as patch, Gpu() as gpu:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that is not there")
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        patch.setattr(Tensor, "pin_memory", _pinned)
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # one that does nothing, where there is no GPU
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # torch.tensor(..., device="cuda")
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # their `.data` would keep the old values
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)  # type: ignore[attr-defined]
            torch.__future__.set_overwrite_module_params_on_conversion(False)
