"""What a setting names as 'package.module:name': imported, or said why it cannot be."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any


class NotFound(Exception):
    """Nothing can be called by that name; the message says why and what to do."""


def load_callable(name: str) -> Callable[..., Any]:
    """The function or class behind ``package.module:name``.

    Raises:
        NotFound: there is none.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise NotFound(
            "expected 'package.module:function', for instance 'my_rules:mine' for the function "
            "mine in my_rules.py"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise NotFound(
            f"cannot import {module_name} ({raised_at(error)}); run from the folder it lies in, "
            "install it, or put it on PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [n for n, f in vars(module).items() if getattr(f, "__module__", None) == module_name]
        names = ", ".join(sorted(own)) or "none"
        raise NotFound(f"{module_name} has no function {attribute!r}; it has {names}")
    return found


def raised_at(error: Exception) -> str:
    """An error in one line: its type and message, and the line of code outside the libraries."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and "site-packages" not in frame.filename
    ]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"
