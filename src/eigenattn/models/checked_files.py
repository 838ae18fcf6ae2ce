"""Files that anybody may have written, checked as they are read: configurations, and tensors by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import EigenAttnError

# Of a configuration: a thousand layers take some 50 kB.
MOST_CONFIG_BYTES = 4_000_000
FLOATS = ("F64", "F32", "BF16", "F16")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a small file.

    Args:
        what: it should be.

    Raises:
        EigenAttnError: if it is something else.
    """
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise EigenAttnError(f"{path} is larger than any {what}: {path.stat().st_size:,} bytes.")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        raise EigenAttnError(f"{path} is not a {what}.") from error
    if not isinstance(values, dict):
        raise EigenAttnError(f"{path} is not a {what}.")
    return values


def read_into(wanted: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Read tensors by their names; shapes are compared before one is read.

    Args:
        what: they are.

    Raises:
        EigenAttnError: if the file is damaged, or holds other names, shapes or kinds of numbers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted({*wanted} - names), sorted(names - {*wanted})
            if missing:
                raise EigenAttnError(f"{path} lacks {missing[0]}: is it truncated?")
            if extra:
                raise EigenAttnError(f"{path} holds {extra[0]!r}, which is none of these {what}.")
            for where, parameter in wanted.items():
                stored = file.get_slice(where)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if shape != tuple(parameter.shape):
                    raise EigenAttnError(
                        f"{where} has shape {shape} in {path}, and this model asks for {tuple(parameter.shape)}: "
                        f"were the {what} made for another model?"
                    )
                if dtype not in FLOATS:
                    raise EigenAttnError(f"{where} is of {dtype} in {path}, not of {', '.join(FLOATS)}.")
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(where))
                if not parameter.isfinite().all():
                    raise EigenAttnError(f"{where} in {path} holds NaN or infinite numbers in {parameter.dtype}.")
    except (SafetensorError, OSError) as error:
        raise EigenAttnError(f"{path} could not be read: {error}") from error
