"""enable_tree_attention: a model reads TreeCaches in place and computes repeated prompts once."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils import logging

from ..errors import InvalidArgument, UnsupportedModel
from ..naming import CACHE, cache_name
from . import latent, stop_strings
from .adapters import active_adapters
from .attention import NAME
from .cache import TreeCache
from .experts import with_grouped_experts
from .late_ends import LateEnds
from .prepare import Collapsed, Forward, expand_output

if TYPE_CHECKING:
    from .decode_graph import DecodeGraphs, GraphStats

logger = logging.get_logger(__name__)

OWN_ATTENTION = frozenset(
    {"git", "deepseek_v4", "inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"}
)
"""Text models that say they use transformers' attention interface, and need what only their own
attention does: additive masks, keys longer than the mask, sinks for each query."""

CUTS_ITS_INPUT = frozenset({"cpmant"})
"""Models that are given all tokens at every forward, and leave out what is cached by themselves."""


def enable_tree_attention(
    model: nn.Module,
    *,
    cuda_graphs: bool | Literal["auto"] = "auto",
    compile: bool = False,
    replace_default_cache: bool = False,
) -> EnabledTreeAttention:
    """Switch ``model`` to tree attention, in place.

    - Its attention reads the blocks of a :class:`TreeCache` where they are; with any other cache,
      in training and in encoders it runs transformers' sdpa as before.
    - Equal rows of a prompt (``num_return_sequences``, ``num_beams``, repeated prompts of a batch,
      each chunk of a chunked prefill) are computed once and forked.
    - A bare ``TreeCache()`` is configured from the model at its first forward.
    - A forward that fails leaves the cache as it was.
    - On a CUDA GPU, decode steps are replayed from CUDA graphs where the model allows it.
    - While it decodes there, sparse experts in bfloat16 keep their grouped products.
    - A cache that was filled under other PEFT adapters is refused.
    - A deep copy of it, or what was pickled, is a model by itself, which is not enabled.
    - Threads may call it at the same time, each with caches of its own, on one CUDA stream.

    Models that do not use transformers' attention interface (bloom, falcon, gptj, ...) keep their
    own attention, whose products read the blocks in place; the rest of the above holds for them
    too.

    Args:
        model: a transformers model, or a PEFT model around one.
        cuda_graphs: "auto" where they can be used, and a word (once) where they cannot; True
            insists on a model on a CUDA GPU with Triton; False runs every step eagerly.
        compile: compile the decoder layers (:func:`torch.compile`) for the graphs; takes some
            seconds at the first decode steps, and rounds differently.
        replace_default_cache: put a TreeCache in the place of the empty DynamicCache that
            ``generate`` makes for callers who pass no cache.

    Returns:
        A handle to undo it: ``handle.disable()``, or use it as a context manager.

    Raises:
        InvalidArgument: not a transformers model, or one that is enabled already; graphs that are
            insisted on, and no GPU or no Triton; ``compile`` without graphs.
    """
    base = base_of(model)
    if not isinstance(base, PreTrainedModel):
        raise InvalidArgument(
            f"enable_tree_attention({type(model).__name__}): expected a transformers model."
        )
    with SWITCHING:
        if is_enabled(base):
            raise InvalidArgument(
                f"enable_tree_attention: this {type(base).__name__} is enabled already. Keep the "
                "handle of the first call and disable() it, or write "
                "`with enable_tree_attention(...)`."
            )
        graphs = _make_graphs(base, cuda_graphs, compile)
        return EnabledTreeAttention(base, replace_default_cache, graphs)


def borrow_tree_attention(model: Any) -> Callable[[], None]:
    """Enable it unless it is, until all who borrowed it have called what this returns.

    Where the user enabled it, that does nothing.
    """
    with SWITCHING:
        handle: EnabledTreeAttention | None = vars(base_of(model)).get(HANDLE)
        if handle is None:
            handle = enable_tree_attention(model)
            handle._borrowers = 0
        if handle._borrowers is None:
            return lambda: None
        handle._borrowers += 1
        return handle._give_back


def base_of(model: Any) -> Any:
    """The transformers model itself, also of a PEFT model around one."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    return unwrap()


def is_enabled(model: Any) -> bool:
    """Whether :func:`enable_tree_attention` is active on ``model``."""
    return HANDLE in vars(base_of(model))


SWITCHING = threading.RLock()
"""Held while models are switched, so that threads agree on who does it."""

HANDLE = "_tree_attention"
"""Attribute of an enabled model: its :class:`EnabledTreeAttention`."""

ATTACHED = (
    HANDLE,
    "_prepare_cache_for_generation",
    "_optimize_model_for_decode",
    "__deepcopy__",
    "__reduce_ex__",
    "init_continuous_batching",
    "forward",
)
"""Attributes that hide those of a model's class while it is enabled."""


class EnabledTreeAttention:
    """Undoes :func:`enable_tree_attention`; a context manager that does so at its end.

    Attributes:
        graphs: how decode steps ran; None without CUDA graphs.
    """

    def __init__(
        self, model: PreTrainedModel, replace_default_cache: bool, graphs: DecodeGraphs | None
    ) -> None:
        self._model = model
        self._replaces_cache = replace_default_cache
        self._graphs = graphs
        self.graphs: GraphStats | None = None if graphs is None else graphs.stats
        self._hooks = _Hooks()
        self._handles: list[RemovableHandle] = []
        self._borrowers: int | None = None  # None where the user holds this
        self._attach()

    def disable(self) -> None:
        """Give the model back as it was; caches stay usable, read densely. Harmless twice."""
        with SWITCHING:
            if self._handles:
                self._detach()
                if self._graphs is not None:
                    self._graphs.close()

    def _give_back(self) -> None:
        with SWITCHING:
            assert self._borrowers is not None
            self._borrowers -= 1
            if not self._borrowers:
                self.disable()

    def _attach(self) -> None:
        model, hooks = self._model, self._hooks
        self._forward = vars(model).get("forward")
        self._previous = [(c, c._attn_implementation_internal) for c in _configs(model)]
        _set_implementation(model)
        self._deferred = latent.defer_expansions(model)
        if self._replaces_cache or hasattr(model, "_prepare_cache_for_generation"):
            model._prepare_cache_for_generation = _with_tree_cache(model, self._replaces_cache)
        if self._graphs is not None:
            model.forward = _with_graphs(model.forward, self._graphs)
        # Transformers' own helpers may go, this one and the one above.
        if hasattr(model, "_optimize_model_for_decode"):
            model._optimize_model_for_decode = with_grouped_experts(model, hooks.num_rows)
        self._late_ends = LateEnds(model, hooks.last_cache)
        stop_strings.hand_tokenizer_on(model)
        vars(model)[HANDLE] = self
        vars(model)["__deepcopy__"] = self._copy
        vars(model)["__reduce_ex__"] = self._reduce
        if any(config._attn_implementation_internal == NAME for config in _configs(model)):
            # generate_batch begins with it.
            model.init_continuous_batching = _refuse_continuous_batching
        self._handles = [
            model.register_forward_pre_hook(hooks, with_kwargs=True),
            model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True),
        ]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in ATTACHED:
            vars(self._model).pop(name, None)
        if self._forward is not None:
            self._model.forward = self._forward
        self._late_ends.undo()
        stop_strings.undo(self._model)
        latent.undo(self._deferred)
        for config, implementation in self._previous:
            config._attn_implementation_internal = implementation

    def _copy(self, memo: dict[int, Any]) -> PreTrainedModel:
        """The model's deep copy is not enabled: what is attached here would run this model."""
        with SWITCHING:
            self._detach()
            try:
                return copy.deepcopy(self._model, memo)
            finally:
                self._attach()

    def _reduce(self, protocol: Any) -> Any:
        """What is pickled is not enabled either: a copy of the model, around the same tensors."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        return self._copy({id(tensor): tensor for tensor in tensors}).__reduce_ex__(protocol)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "What enable_tree_attention returned cannot be pickled or copied. Pickle the model, "
            "and enable it where it is loaded."
        )

    def __enter__(self) -> EnabledTreeAttention:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()


def _make_graphs(model: PreTrainedModel, wanted: bool | str, compile: bool) -> DecodeGraphs | None:
    if wanted not in (True, False, "auto"):
        raise InvalidArgument(
            f"enable_tree_attention(cuda_graphs={wanted!r}): True, False, 'auto'."
        )
    if compile and not wanted:
        raise InvalidArgument(
            "enable_tree_attention(compile=True, cuda_graphs=False): layers are compiled for the "
            "graphs; leave cuda_graphs out."
        )
    obstacle = None
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        obstacle = "there is no CUDA GPU"
    elif wanted is True and model.device.type != "cuda" and torch.cuda.is_available():
        obstacle = f"the model is on {model.device}"
    elif wanted:
        try:
            # Triton is optional.
            from .decode_graph import DecodeGraphs
        except ImportError as error:
            obstacle = f"Triton is missing ({error})"
    if wanted is True and obstacle is not None:
        raise InvalidArgument(
            f"enable_tree_attention(cuda_graphs=True): {obstacle}. Move the model to a CUDA GPU "
            "first, or leave cuda_graphs out."
        )
    if compile and obstacle is not None:
        logger.warning_once(
            f"enable_tree_attention(compile=True): nothing is compiled: {obstacle}."
        )
    return None if obstacle is not None or not wanted else DecodeGraphs(model, compile=compile)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    raise InvalidArgument(
        "Continuous batching has a cache and an attention of its own, which a model with tree "
        "attention has given up. Call disable() on what enable_tree_attention returned, before "
        "generate_batch; or give all prompts to generate, or to a BranchRunner, with a TreeCache."
    )


def _with_graphs(forward: Callable[..., Any], graphs: DecodeGraphs) -> Callable[..., Any]:
    # All steps go through the same buffers, and while one is captured the model computes in ways
    # that are for that step alone.
    turn = threading.RLock()

    @functools.wraps(forward)
    def decode(*args: Any, **kwargs: Any) -> Any:
        # A compiler that looks into the model sees its plain forward.
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with turn:
            output = None if args else graphs.run(forward, kwargs)
            return forward(*args, **kwargs) if output is None else output

    return decode


def _with_tree_cache(model: PreTrainedModel, replaces: bool) -> Callable[..., Any]:
    """``generate``'s choice of a cache, but a TreeCache if it ``replaces`` a plain default one."""
    prepare = model._prepare_cache_for_generation

    def choose(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any):
        given = model_kwargs.get(CACHE)
        _refuse_class("generate", CACHE, given)
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get(CACHE)
        plain = type(made) is DynamicCache and not made.offloading
        if replaces and given is None and plain and not generation_config.is_assistant:
            model_kwargs[CACHE] = TreeCache()
        return result

    return choose


def _refuse_class(call: str, name: str, given: Any) -> None:
    if isinstance(given, type):
        said = f"{name}={given.__name__}"
        raise InvalidArgument(f"{call}({said}): that is a class; pass an object, {said}().")


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config of the model and of the models within it, each once."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:
        subs = (getattr(config, key, None) for key in config.sub_configs)
        configs.extend(
            sub for sub in subs if sub is not None and all(sub is not c for c in configs)
        )
    return list({id(config): config for config in configs}.values())


def _set_implementation(model: PreTrainedModel) -> None:
    text = model.config.get_text_config(decoder=True)
    part = model if model._can_set_attn_implementation() else _text_model(model, text)
    if part is None or _keeps_its_attention(model, text.model_type):
        logger.info("%s has its own attention.", type(model).__name__)
        return
    if part is not model:
        part.set_attn_implementation(NAME)
        return
    if text is model.config or model.config.is_encoder_decoder:
        model.set_attn_implementation(NAME)
        return
    key = next(
        (key for key in model.config.sub_configs if getattr(model.config, key) is text), None
    )
    model.set_attn_implementation(NAME if key is None else {key: NAME})


def _text_model(model: PreTrainedModel, text: Any) -> PreTrainedModel | None:
    """The part of ``model`` that takes our attention where the encoder of its pictures cannot."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    able = (part for part in parts if part is not model and part.config is text)
    return next((part for part in able if part._can_set_attn_implementation()), None)


def _keeps_its_attention(model: PreTrainedModel, model_type: str) -> bool:
    """Whether another name of the implementation would change what the model computes."""
    if model_type in OWN_ATTENTION:
        return True
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    files = {type(part).__module__ for part in parts}
    # Sparse attention (DeepSeek V3.2) looks for "eager" or "sdpa" by name, else passes indices.
    return any("_attn_implementation in (" in _source(file) for file in files)


def _source(module_name: str) -> str:
    try:
        return inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):  # a notebook's class has no file
        return ""


class _Hooks(threading.local):
    """The pair of hooks around a model's forward. Each thread has forwards of its own."""

    def __init__(self) -> None:
        self._last: weakref.ref[TreeCache] | None = None
        self._open: list[tuple[TreeCache | None, Collapsed | None]] = []

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._open.append((None, None))
        if args:
            names = inspect.signature(model.forward).parameters
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        kwargs = stop_strings.drop_tokenizer(model, kwargs)
        name = cache_name(kwargs)
        cache: Any = kwargs.get(name)
        _refuse_class(type(model).__name__, name, cache)
        if isinstance(cache, EncoderDecoderCache):
            inner = cache.self_attention_cache
            if isinstance(inner, TreeCache):
                inner.advise = False
                inner.configure(model.config)
                self._open[-1] = (inner, None)
            return (), kwargs
        if not isinstance(cache, TreeCache):
            return (), kwargs
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{type(model).__name__} is an encoder-decoder: pass {CACHE}="
                "EncoderDecoderCache(TreeCache(), TreeCache()) instead of a bare TreeCache."
            )
        if model.config.model_type in CUTS_ITS_INPUT:
            raise UnsupportedModel(
                f"{type(model).__name__} is given all tokens every time, so which are new "
                "TreeCache cannot know: use the cache that transformers makes for it."
            )
        cache.advise = False
        cache.configure(model.config)
        cache.check_adapters(active_adapters(model))
        forward = Forward(cache, kwargs)
        self._open[-1] = (cache, forward.prepare())
        return (), forward.kwargs

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # A pre-hook before ours may have failed; torch then calls this one all the same.
        cache, collapsed = self._open.pop() if self._open else (None, None)
        self._last = None
        if cache is None:
            return output
        if output is None:
            cache.abandon()
            if collapsed is not None and cache.rows:
                cache.select(collapsed.restore)
            return None
        cache.finish()
        if collapsed is not None:
            cache.select(collapsed.inverse)
            output = expand_output(output, collapsed)
        self._last = weakref.ref(cache)
        return output

    def last_cache(self) -> TreeCache | None:
        """That the last forward ended with; None if it had none, or failed."""
        return None if self._last is None else self._last()

    def num_rows(self) -> int:
        """Of that cache; 0 without one."""
        cache = self.last_cache()
        return 0 if cache is None else len(cache.tree.rows)
