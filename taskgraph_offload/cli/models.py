"""From what a person types to a model: `module:factory`, or a configuration file of diffusers or transformers.

A configuration is built without weights, on the meta device. Nothing is downloaded, and no code from a model's own
repository is ever run.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SettingsError
from .examples import Maker, Sizes, example_inputs

LARGEST_CONFIG = 4 * 2**20  # bytes
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Subject:
    """A model, the inputs of one forward (None: whatever the library finds), and in words what those are.

    >>> Subject(nn.Identity()).described("symbolic")
    'none known: the order of the blocks was traced without shapes'
    """

    model: nn.Module
    inputs: Any = None
    note: str = ""

    def described(self, source: str) -> str:
        """In words: the inputs that a trace from this source was made with."""
        found = "none known: the order of the blocks was traced without shapes"
        return self.note or (found if source == "symbolic" else "the model's own example, its dummy_inputs")


def from_factory(name: str) -> Subject:
    """What `module:factory` gives: a model, or a pair of a model and its inputs. The current folder is importable.

    >>> type(from_factory("torch.nn:Identity").model).__name__
    'Identity'
    """
    made = _called(name)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"{name} gave {_short(made)}; it must give a model, or (model, inputs)")
    return Subject(model, inputs, "" if inputs is None else f"those of {name}")


def from_config(path: str, sizes: Sizes, device: str = "meta", dtype: str | None = None) -> Subject:
    """The model that a configuration file describes, with realistic inputs where its architecture is known."""
    fields = _read(path)
    type_of_values = _dtype_of(fields, dtype)
    try:
        build = _builder(fields)
        with _libraries_quiet(), _built_on(device, type_of_values):
            model = build()
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    except Exception as error:
        raise SettingsError(f"{path}: cannot be built: {type(error).__name__}: {error}") from error
    example = example_inputs(model, sizes, Maker(torch.device(device), type_of_values))
    if example is None:
        return Subject(model.eval())
    return Subject(model.eval(), example[0], ", ".join(f"{name} {size}" for name, size in example[1].items()))


def _short(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _called(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise SettingsError(f"{name!r} names no model; write module:factory, as in my_models:build")
    factory = _found(module_name, attribute)
    if isinstance(factory, nn.Module) or not callable(factory):
        return factory
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise SettingsError(f"{name} raised {type(error).__name__}: {error}") from error


def _found(module_name: str, attribute: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise SettingsError(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise SettingsError(f"module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def _read(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        fields = json.loads(content) if len(content) <= LARGEST_CONFIG else None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: this is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise SettingsError(f"{path}: a model's configuration is a JSON object of at most {LARGEST_CONFIG} bytes")
    return fields


def _dtype_of(fields: Mapping[str, Any], asked: str | None) -> torch.dtype:
    """The dtype asked for, else the one in the configuration, else bfloat16."""
    name = asked or fields.get("dtype") or fields.get("torch_dtype")
    dtype: torch.dtype = getattr(torch, name if name in DTYPES else DTYPES[0])
    return dtype


def _builder(fields: dict[str, Any]) -> Callable[[], nn.Module]:
    """What builds the model of a configuration: the class that it names, in the library that it is written for."""
    if "_class_name" in fields:
        return _from_diffusers(fields)
    if "model_type" in fields:
        return _from_transformers(fields)
    raise SettingsError("neither '_class_name' (diffusers) nor 'model_type' (transformers) is in this configuration")


def _from_diffusers(fields: dict[str, Any]) -> Callable[[], nn.Module]:
    kind: Any = _model_class(_library("diffusers"), fields["_class_name"])
    return lambda: kind.from_config(fields)


def _from_transformers(fields: dict[str, Any]) -> Callable[[], nn.Module]:
    transformers, family = _library("transformers"), str(fields["model_type"])
    if family not in transformers.CONFIG_MAPPING:
        raise SettingsError(f"transformers {transformers.__version__} has no model_type {family!r}")
    config = transformers.CONFIG_MAPPING[family].from_dict(fields)
    named = fields.get("architectures") or ()
    name = named if isinstance(named, str) else next(iter(named), None)
    if name is None:
        return lambda: transformers.AutoModel.from_config(config)
    kind = _model_class(transformers, name)
    return lambda: kind(config)


def _model_class(library: Any, name: object) -> type[nn.Module]:
    kind = getattr(library, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise SettingsError(f"{library.__name__} {library.__version__} has no model {name!r}")
    return kind


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(f"this needs {name}: pip install 'taskgraph-offload[models]' ({error})") from error


@contextmanager
def _built_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Errors only: what a configuration has too much or too little is not for whoever asks for a plan."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
