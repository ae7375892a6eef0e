"""From what a person types to a model: a known name, `module:factory`, a configuration file, or a directory with one.

The folder `known` holds, for each known name, the model's configuration and the trace of one forward at its usual
sizes. A model that is built from a configuration of diffusers or transformers has no weights: it is on the meta device.
This module never downloads anything, and never runs code from a model's own repository.
"""

from __future__ import annotations

import gzip
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
from ..nouns.trace import Trace
from ..plan.file import trace_of
from .inputs import Maker, Sizes, example_call

LARGEST_CONFIG = 4 * 2**20  # bytes
DTYPES = ("bfloat16", "float16", "float32")
KNOWN = Path(__file__).parent / "known"


@dataclass(frozen=True)
class Subject:
    """A model, the inputs of one call (None: the library looks for some), their description, and the method.

    >>> Subject(nn.Identity()).described("symbolic")
    'none known: the order of the blocks was traced without shapes'
    """

    model: nn.Module
    inputs: Any = None
    note: str = ""
    entry: str = "forward"

    def described(self, source: str) -> str:
        """In words: the inputs that a trace from this source was made with."""
        found = "none known: the order of the blocks was traced without shapes"
        return self.note or (found if source == "symbolic" else "the model's own example, its dummy_inputs")


@dataclass(frozen=True)
class Traced:
    """A known model as it comes with this package: its trace, and a description of the inputs."""

    trace: Trace
    note: str

    def described(self, source: str) -> str:
        """In words: the inputs that the trace was made with."""
        return self.note


def known_names() -> list[str]:
    """The models that come with this package.

    >>> "flux1-dev" in known_names()
    True
    """
    return sorted(path.stem for path in KNOWN.glob("*.json"))


def known_trace(name: str) -> Traced:
    """The trace of a known model.

    >>> known_trace("t5-xxl").note
    'batch 1, tokens 512'
    """
    content = json.loads(gzip.decompress((KNOWN / f"{name}.trace.gz").read_bytes()))
    return Traced(trace_of(content["trace"], content["model"]), content["inputs"])


def from_factory(name: str) -> Subject:
    """What `module:factory` returns: a model, or a model and its inputs. The current folder is importable.

    >>> type(from_factory("torch.nn:Identity").model).__name__
    'Identity'
    """
    made = _called(name)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"{name} returned {_short(made)}; it must return a model, or (model, inputs)")
    return Subject(model, inputs, "" if inputs is None else f"those that {name} returned")


def from_config(path: str, sizes: Sizes, device: str = "meta", dtype: str | None = None) -> Subject:
    """The model of a configuration file. If its architecture is known, with realistic inputs."""
    return _built(path, read_json(path), sizes, device, dtype)


def from_name(name: str, sizes: Sizes, device: str = "meta", dtype: str | None = None) -> Subject:
    """A known model, built from its configuration: for other inputs than those of its trace, or with weights."""
    return _built(name, read_json(str(KNOWN / f"{name}.json")), sizes, device, dtype)


def _built(called: str, fields: dict[str, Any], sizes: Sizes, device: str, dtype: str | None) -> Subject:
    type_of_values = _dtype_of(fields, dtype)
    model = model_of(called, fields, device, type_of_values)
    call = example_call(model, sizes, Maker(torch.device(device), type_of_values))
    return Subject(model) if call is None else Subject(model, call.inputs, call.described, call.entry)


def model_of(called: str, fields: dict[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration that a person knows by the name `called`."""
    try:
        build = _builder(fields, dtype)
        with _libraries_quiet(), _built_on(device, dtype):
            return build().eval()
    except SettingsError as error:
        raise SettingsError(f"{called}: {error}") from None
    except Exception as error:
        raise SettingsError(f"{called}: cannot be built: {type(error).__name__}: {error}") from error


def _short(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _called(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise SettingsError(
            f"there is no model and no directory {name!r}; known are {', '.join(known_names())}; "
            "for a model of yours write module:factory, such as my_models:build"
        )
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


def read_json(path: str) -> dict[str, Any]:
    """The object in a file of JSON that describes a model or a pipeline."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        fields = json.loads(content) if len(content) <= LARGEST_CONFIG else None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise SettingsError(f"{path}: a configuration must be a JSON object of at most {LARGEST_CONFIG} bytes")
    return fields


def _dtype_of(fields: Mapping[str, Any], asked: str | None) -> torch.dtype:
    """The dtype that was asked for, or the one in the configuration, or bfloat16."""
    name = asked or fields.get("dtype") or fields.get("torch_dtype")
    dtype: torch.dtype = getattr(torch, name if name in DTYPES else DTYPES[0])
    return dtype


def _builder(fields: dict[str, Any], dtype: torch.dtype) -> Callable[[], nn.Module]:
    """A function that builds the model: it calls the class that the configuration names."""
    if fields.get("quantization_config"):
        raise SettingsError("quantized weights cannot be planned from a configuration; give a module:factory")
    if "_class_name" in fields:
        return _from_diffusers(fields)
    if "model_type" in fields:
        return _from_transformers(fields, dtype)
    raise SettingsError("this configuration has neither '_class_name' (diffusers) nor 'model_type' (transformers)")


def _from_diffusers(fields: dict[str, Any]) -> Callable[[], nn.Module]:
    kind: Any = _model_class(library("diffusers"), fields["_class_name"])
    return lambda: kind.from_config(fields)


def _from_transformers(fields: dict[str, Any], dtype: torch.dtype) -> Callable[[], nn.Module]:
    transformers, family = library("transformers"), str(fields["model_type"])
    if family not in transformers.CONFIG_MAPPING:
        raise SettingsError(f"transformers {transformers.__version__} has no model_type {family!r}")
    config = transformers.CONFIG_MAPPING[family].from_dict(fields)
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)  # some parts are built with it
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


def library(name: str) -> Any:
    """Import diffusers or transformers."""
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
    """Hide warnings of diffusers and transformers, for example about unused keys in a configuration."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
