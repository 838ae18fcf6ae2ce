"""Model types that have no row of their own, and whose attention runs the same code as a known family's.

Many model types of transformers are copies of a few. What is compared is compiled code: of `forward`, of the methods
and of the functions of the models' modules that it calls. How a module is made is not compared, so that a model of such
a type is held to the original's predictions when it is converted (`eigenattn.models.conversion`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

# How deep functions that functions call are followed (chosen: rotation is two deep).
DEPTH = 4


def recognised(config: Any, known: Mapping[str, str]) -> tuple[str, str] | None:
    """The first known model type whose attention runs the same code as another type's.

    Args:
        config: class of the other type's configuration.
        known: names of the attention class, by model type.

    Returns:
        The known type, and the name of the other's attention class; None if there is none.
    """
    module = _module(config.model_type) or _module_of(config)
    if module is None:
        return None
    own = [kind for kind in vars(module).values() if _is_attention(kind, module)]
    for model_type, name in known.items():
        theirs = getattr(_module(model_type), name, None)
        if theirs is None or not inspect.isclass(theirs):
            continue
        same = [kind for kind in own if _code(kind) == _code(theirs)]
        if len(same) == 1:
            return model_type, same[0].__name__
    return None


def _module(model_type: str) -> ModuleType | None:
    """The module in which transformers defines the models of a type; None if there is none, or it does not import."""
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        name: Any = names.get(model_type)
        if isinstance(name, str):
            with contextlib.suppress(AttributeError, ImportError, KeyError):
                return sys.modules[getattr(transformers, name).__module__]
    # Some language models inside of others have a configuration alone.
    return _module_of(CONFIG_MAPPING[model_type]) if model_type in CONFIG_MAPPING else None


def _module_of(config: Any) -> ModuleType | None:
    """The module beside the one that defines a configuration."""
    if not config.__module__.startswith("transformers.models."):
        return None
    try:
        return importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None


def _is_attention(kind: Any, module: ModuleType) -> bool:
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module) or kind.__module__ != module.__name__:
        return False
    return "Attention" in kind.__name__ and isinstance(vars(kind).get("forward"), FunctionType)


@functools.cache
def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    return _code_of(vars(kind)["forward"], kind, DEPTH)


def _code_of(function: Callable[..., Any], kind: type[nn.Module], depth: int) -> tuple[Any, ...]:
    """What a function does, comparable: its own code, and that of what it calls."""
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType):
        return ()
    called: dict[str, tuple[Any, ...]] = {}
    for name in plain.__code__.co_names if depth else ():
        found = vars(kind).get(name, plain.__globals__.get(name))
        if isinstance(found, FunctionType) and inspect.unwrap(found).__module__.startswith("transformers.models"):
            called[name] = _code_of(found, kind, depth - 1)
    return _comparable(plain.__code__, plain.__doc__), tuple(sorted(called.items()))


def _comparable(code: CodeType, doc: str | None) -> tuple[Any, ...]:
    constants = [_comparable(x, None) if isinstance(x, CodeType) else repr(x) for x in code.co_consts if x != doc]
    return code.co_code, code.co_names, code.co_varnames, tuple(constants)
