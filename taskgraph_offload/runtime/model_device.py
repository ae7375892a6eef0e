"""Lets `model.device` name the device where the model runs, while its weights are at home.

Many classes of models have a property `device` that looks at weights. Pipelines and `generate` ask it where to put
tensors. While a model is attached, its class has another property in this place:

    model.device  ->  is this module attached?  yes: the execution device
                                                no:  what the class said before, for all other modules of this class

So nothing is stored in the model: its copies and its pickles have nothing of this, and its class stays the same.
"""

from __future__ import annotations

import inspect
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_ONE_AT_A_TIME = Lock()  # two threads may attach two models of one class


class ModelDevice:
    """The answers of one model, and of all modules in it, until `remove`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._told: list[tuple[_Device, nn.Module]] = []
        with _ONE_AT_A_TIME:
            for module in model.modules():
                if isinstance(found := inspect.getattr_static(type(module), "device", None), property):
                    here = vars(type(module)).get("device")
                    told = here if isinstance(here, _Device) else _Device(type(module), found)
                    told.devices[module] = device
                    self._told.append((told, module))

    def remove(self) -> None:
        """Let the modules answer as before."""
        with _ONE_AT_A_TIME:
            for told, module in self._told:
                told.devices.pop(module, None)
                told.remove_if_unused()


class _Device(property):
    """The property `device` of one class, as long as modules of this class are attached."""

    def __init__(self, kind: type[nn.Module], found: property) -> None:
        own = vars(kind).get("device")  # None if the class inherits its property
        devices = WeakKeyDictionary[nn.Module, torch.device]()

        def device(module: nn.Module) -> Any:
            if (told := devices.get(module)) is not None:
                return told
            inherited: Any = super(kind, module)
            return inherited.device if own is None else own.__get__(module, kind)

        super().__init__(device, found.fset, found.fdel, found.__doc__)
        self.devices, self._kind, self._own = devices, kind, own
        type.__setattr__(kind, "device", self)

    def remove_if_unused(self) -> None:
        """Put back what the class had before."""
        if self.devices or vars(self._kind).get("device") is not self:  # the user may have replaced it
            return
        if self._own is None:
            type.__delattr__(self._kind, "device")
        else:
            type.__setattr__(self._kind, "device", self._own)
