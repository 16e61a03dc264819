"""A second device on a machine that has only a CPU: its memory is the CPU's, its name is not.

Run as a script, it splits tiny models over the two as ``device_map`` does (accelerate's hooks) and
compares `generate` with one device. Mixing devices in one operation raises, as with a GPU. It needs
a process of its own, because torch then knows one more backend for good.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import assert_same, build, generate, prompts
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hf_tree_cache import TreeCache, enable_tree_attention
from hf_tree_cache.naming import CACHE

SECOND = torch.device("privateuseone:0")
BETWEEN_DEVICES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._local_scalar_dense.default,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "max_new_tokens": 5},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5},
    "beam search": {"do_sample": False, "num_beams": 3, "max_new_tokens": 5},
}


class Far(torch.Tensor):
    """A tensor on the second device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> Far:
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=SECOND,
            requires_grad=requires_grad,
        )
        far.inner = inner
        return far

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on the CPU, its results where the device's own kernels would leave them."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = {id(x.inner): x for x in tensors if isinstance(x, Far)}
    near = [x for x in tensors if not isinstance(x, Far) and x.ndim]
    if far and near and func not in BETWEEN_DEVICES:
        raise RuntimeError(f"{func}: expected all tensors on the same device")
    device = kwargs.get("device")
    to_far = bool(far) if device is None else torch.device(device) == SECOND
    if func is torch.ops.aten.copy_.default:
        to_far = isinstance(args[0], Far)
    args, kwargs = tree_map_only(Far, lambda x: x.inner, (args, kwargs))
    if device is not None and to_far:
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda x: far.get(id(x), Far(x) if to_far else x), out)


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """``torch.tensor(list, device=...)`` and ``tensor[list]`` do not come by the dispatcher."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device) == SECOND:
            return func(*args, **{**kwargs, "device": "cpu"}).to(SECOND)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(args[0].device))
        elif func is torch.Tensor.__setitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(args[0].device), args[2])
        return func(*args, **kwargs)


def split(model: Any) -> Any:
    """Move the second of the layers, and have accelerate take its arguments there and back."""
    layer = model.model.layers[1]
    for module in layer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(Far(weight.data), requires_grad=False)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = Far(buffer)
    hook = AlignDevicesHook(SECOND, io_same_device=True, skip_keys=CACHE)
    add_hook_to_module(layer, hook)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others count otherwise off the CPU
    return model


def main(names: list[str]) -> None:
    _setup_privateuseone_for_python_backend()
    torch.set_num_threads(1)
    for name in names:
        inputs = prompts(name)
        modes = MODES if name == names[0] else {"sampling": MODES["sampling"]}
        want = {mode: generate(build(name), inputs, **modes[mode]) for mode in modes}
        with TwoDevices(), Literals():
            model = split(build(name))
            assert_same(generate(model, inputs, **modes["sampling"]), want["sampling"])
            with enable_tree_attention(model):
                for mode, options in modes.items():
                    cache = TreeCache(poison=True)
                    ours = generate(model, inputs, past_key_values=cache, **options)
                    assert_same(ours, want[mode])
                    cache.check_integrity()
                    assert not cache.dense_reads
        first, second = (layer.storage.spec.device for layer in cache.layers[:2])
        assert (first, second) == (torch.device("cpu"), SECOND)
        print(name, "agrees")
    try:
        with TwoDevices():
            torch.ones(2) + Far(torch.ones(2))
    except RuntimeError as error:
        assert "same device" in str(error)
        print("devices do not mix")


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    main(sys.argv[1:])
