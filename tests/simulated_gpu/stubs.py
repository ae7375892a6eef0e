"""Stand-ins for NVIDIA's libraries: every function that torch's shared objects want of them, doing nothing.

`wanted` reads from the shared objects which functions they want, of which library, in which version. `build` makes a
library of each name. A function that one of the files of `runtime/` has is taken from there.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
SOURCES = {  # the libraries that do something, and what they are made of
    "libcudart": [RUNTIME / f"{name}.cpp" for name in ("control", "memory", "races", "streams", "cudart")],
    "libcublas": [RUNTIME / "cublas.cpp"],
    "libcublasLt": [RUNTIME / "cublas.cpp"],
}
_NVIDIA = re.compile(r"lib(cuda|cudart|cu\w+|nv\w+|nccl)[\w-]*\.so|libnvToolsExt")
_PREFIXES = {"libcudart": ("cuda", "__cuda"), "libcuda": ("cu",), "libcufile": ("cuFile",), "libnvToolsExt": ("nvtx",)}
_ANSWERS = {  # functions whose answer matters
    "cuDevicePrimaryCtxGetState": "(int device, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }",
    "cuCtxGetCurrent": "(void** context) { *context = (void*)8; return 0; }",
}

Wanted = Mapping[str, Mapping[str, set[str]]]  # library -> version of its symbols, "" where they have none -> functions


def wanted(torch_folder: Path) -> Wanted:
    """What the shared objects of this torch want of NVIDIA's libraries."""
    objects = [*torch_folder.glob("lib/*.so*"), *torch_folder.glob("*.so")]
    symbols = {path: _symbols(path) for path in objects}
    defined = {name for ours, _ in symbols.values() for name in ours}
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path, (_, missing) in symbols.items():
        libraries = [name for name in _needed(path) if _NVIDIA.match(name)]
        for library in libraries:
            found[library]  # a library may be needed for nothing
        for name, version in missing:
            source = _library(name, version, libraries)
            if source and name not in defined:
                found[source][version].add(name)
    return found


def build(wants: Wanted, headers: Path, folder: Path) -> None:
    """Make all libraries in this folder. `headers` are those of CUDA's runtime that this torch was built with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "crt").mkdir(exist_ok=True)
    (folder / "crt/host_defines.h").write_text((RUNTIME / "host_defines.h").read_text())
    for library, versions in wants.items():
        stem = library.split(".so")[0]
        objects = [folder / f"{stem}-{source.stem}.o" for source in SOURCES.get(stem, [])]
        for source, made in zip(SOURCES.get(stem, []), objects, strict=True):
            define = f"-DSIMULATES_{stem.upper()}"
            _run(["g++", "-std=c++20", *_COMPILED, define, f"-I{folder}", f"-I{headers}", "-c", "-o", made, source])
        ours = {name for made in objects for name in re.findall(r" T (\w+)", _run(["nm", made]))}
        stub, exports = folder / f"{library}.c", folder / f"{library}.map"
        stub.write_text(_STUB_HEAD + "\n".join(_stub(library, name) for name in sorted(_names(versions) - ours)))
        exports.write_text(_exports(versions, has_control=bool(objects)))
        _run(["gcc", *_COMPILED, "-c", "-o", stub.with_suffix(".o"), stub])
        linked = ["-shared", f"-Wl,-soname,{library}", f"-Wl,--version-script={exports}", "-ldl", "-lpthread"]
        _run(["g++", "-o", folder / library, stub.with_suffix(".o"), *objects, *linked])


def _names(versions: Mapping[str, set[str]]) -> set[str]:
    return set[str]().union(*versions.values())


_COMPILED = ["-fPIC", "-O2", "-w"]
_STUB_HEAD = "#include <stdio.h>\n#include <stdlib.h>\n"


def _stub(library: str, name: str) -> str:
    if name in _ANSWERS:
        return f"int {name}{_ANSWERS[name]}"
    tell = f'if (!told++ && getenv("SIMULATED_GPU_LOUD")) fprintf(stderr, "{library}: {name} does nothing\\n")'
    return f"long {name}(void) {{ static int told; {tell}; return 0; }}"


def _exports(versions: Mapping[str, set[str]], has_control: bool) -> str:
    """A version script. Symbols without a version belong to the anonymous one, which must stand alone."""
    named = {version: names for version, names in versions.items() if version}
    control = "simulated_*; " if has_control else ""
    if not named:
        return "{ global: *; };"
    lines = []
    for version, names in named.items():
        lines.append(f"{version} {{ global: {control}{' '.join(f'{name};' for name in sorted(names))} }};")
        control = ""
    return "\n".join(lines)


def _library(name: str, version: str, libraries: list[str]) -> str | None:
    """Which of the needed libraries has this symbol."""
    if version:
        return next(
            (found for found in libraries if found == version or found.startswith(f"lib{version.lower()}")), None
        )
    fitting = [(len(prefix), found) for found in libraries for prefix in _prefixes(found) if name.startswith(prefix)]
    return max(fitting)[1] if fitting else None


def _prefixes(library: str) -> tuple[str, ...]:
    stem = library.split(".so")[0]
    return _PREFIXES.get(stem, (stem.removeprefix("lib").partition("_")[0],))


def _needed(path: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.*?)\]", _run(["readelf", "-dW", path]))


def _symbols(path: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """The symbols that a shared object defines, and those that it wants, with the version that it wants."""
    defined, missing = set(), set()
    for line in _run(["nm", "-D", path]).splitlines():
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if kind in "Uwv":
            missing.add((name, version.lstrip("@")))
        else:
            defined.add(name)
    return defined, missing


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
    return done.stdout
