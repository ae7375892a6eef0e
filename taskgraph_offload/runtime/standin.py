"""Stands in for a method of one module, as an attribute of that module, and can be taken away without a trace.

    module(x)  ->  vars(module)["forward"], the stand-in  ->  the method that would have been found without it

In a copy or a pickle of the module, a stand-in is the method that the copy would have had.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn


class StandIn:
    """In the place of a method; says only which one that is, and leaves it to others what happens around it."""

    is_offloading = True  # who would trace the model sees this

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self._module = module
        self._own = vars(module).get(name)  # what the module had as an attribute itself
        self.is_removed = False
        functools.update_wrapper(cast(Callable[..., Any], self), self._method(), updated=())
        vars(module)[name] = self

    def _method(self) -> Callable[..., Any]:
        """What would be called if this were not here; a method of the class may have been replaced meanwhile."""
        own = self._own if self._own is not None else self._module._modules.get(self.name)
        return own if own is not None else _method(self._module, self.name)

    def remove(self) -> None:
        """The method is found where it was."""
        self.is_removed = True
        if vars(self._module).get(self.name) is not self:
            return  # the module's owner has put something else there
        if self._own is not None:
            vars(self._module)[self.name] = self._own
        else:
            del vars(self._module)[self.name]

    def __reduce__(self) -> Any:
        """In a copy of the module: the method that the copy would have had."""
        if self._own is not None:
            return _same, (self._own,)
        return _method, (self._module, self.name)


def _method(module: nn.Module, name: str) -> Callable[..., Any]:
    found = inspect.getattr_static(type(module), name)
    method: Callable[..., Any] = found.__get__(module, type(module)) if hasattr(found, "__get__") else found
    return method


def _same(value: Any) -> Any:
    return value
