# SPDX-License-Identifier: Apache-2.0
"""A pretended accelerator: its tensors lie on the host, and obey the rules of a device.

What the engine does on an accelerator (where tensors are made, what meets what, when the host has
to wait) can so be tested without one. An operation on operands of both sides raises, but for those
that a CUDA device admits: copies, host tensors without dimensions, host indices. What would hold up
the host is counted. Collectives take tensors of the device alone, as NCCL's do.

Importing this registers a device with PyTorch for the life of the process: do it in a child.
"""

from collections import Counter
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"
aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}


class Backend(_DummyBackendModule):
    """What autocast and the forking of random states want of a device's module."""

    class device:
        def __init__(self, device: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    manual_seed_all = manual_seed


_setup_privateuseone_for_python_backend(NAME, Backend())
DEVICE = torch.device(NAME, 0)


class Pretended(Tensor):
    """A tensor of the device; ``host`` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Pretended":
        found = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        found.host = host
        return found

    def __repr__(self) -> str:
        return f"Pretended({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class Accelerator(TorchDispatchMode):
    """Inside, ``DEVICE`` can be used.

    Attributes:
        waits: How often the host had to wait, by operation.
        launches: Operations that were not views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self._constructors = _Constructors()

    def __enter__(self) -> "Accelerator":
        self._constructors.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constructors.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tree_leaves((args, kwargs))
        self.launches += not func.is_view and any(isinstance(x, Pretended) for x in operands)
        return _run(func, args, kwargs or {}, self.waits)


class _Constructors(TorchFunctionMode):
    """``torch.tensor`` copies to its device where no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and _is_ours(kwargs.get("device")):
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _beside(function: Any) -> Any:
    """A collective of pickled objects: PyTorch itself sees to the device that the group wants."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return called


dist.all_gather_object = _beside(dist.all_gather_object)
dist.gather_object = _beside(dist.gather_object)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: "Counter[str]") -> Any:
    """Carry out an operation on the host's numbers, by the device's rules."""
    device = kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, Pretended)]
    collective = func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default
    if not here and not _is_ours(device) and not (collective and tensors):
        return func(*args, **kwargs)
    if func.name().startswith("aten::_foreach_"):
        return _run_each(func, args, kwargs)
    strange = [x for x in tensors if not isinstance(x, Pretended) and x.dim()]
    if strange and (here or collective) and func not in COPIES | INDEXED:
        shapes = [tuple(x.shape) for x in strange]
        raise RuntimeError(f"{func} of tensors on the device and on the host, {shapes} there")
    waits.update(_held_up(func, args, kwargs))
    own_args, own_kwargs = tree_map_only(Pretended, lambda x: x.host, (args, dict(kwargs)))
    if device is not None:
        own_kwargs["device"] = torch.device("cpu")
    out = func(*own_args, **own_kwargs)
    if collective:
        return out
    if func is aten.copy_.default:
        return args[0]
    if func is aten._to_copy.default and device is not None and not _is_ours(device):
        return out
    wrapped = tree_map_only(Tensor, Pretended, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _run_each(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on lists, whose members may lie on different devices."""
    lists = [x for x in tree_leaves(args, is_leaf=lambda x: isinstance(x, list)) if _of_tensors(x)]
    for row in zip(*lists, strict=True):
        sides = {isinstance(x, Pretended) for x in row if x.dim()}
        if len(sides) > 1 and func is not aten._foreach_copy_.default:
            raise RuntimeError(f"{func} of a tensor on the device and one on the host")
    own_args, own_kwargs = tree_map_only(Pretended, lambda x: x.host, (args, kwargs))
    out = func(*own_args, **own_kwargs)
    if out is None:
        return None
    pairs = zip(out, lists[0], strict=True)
    return [Pretended(x) if isinstance(like, Pretended) else x for x, like in pairs]


def _of_tensors(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and isinstance(x[0], Tensor)


def _held_up(func: Any, args: Any, kwargs: dict[str, Any]) -> list[str]:
    """What makes the host wait for the device in an operation, by name."""
    if func in WAITS:
        return [str(func)]
    if func is aten.segment_reduce.default and not kwargs.get("unsafe"):
        return [str(func)]
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return [str(func)]
    if func in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1]):
        return [f"{func} by a mask"]
    if func is aten._to_copy.default and isinstance(args[0], Pretended):
        to_host = kwargs.get("device") is not None and not _is_ours(kwargs["device"])
        return ["copy to the host"] * (to_host and not kwargs.get("non_blocking"))
    if func is aten.copy_.default and isinstance(args[1], Pretended):
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return ["copy to the host"] * (blocking and not isinstance(args[0], Pretended))
    return []
