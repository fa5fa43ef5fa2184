"""NVIDIA's run-time compiler without a GPU: cubins, what ptxas says of them, and their instructions.

Needs the packages ``nvidia-cuda-nvrtc`` and ``nvidia-cuda-nvdisasm`` of the extra ``dev``; no driver.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGE = "nvidia-cuda-nvrtc"


@dataclass(frozen=True)
class KernelFacts:
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread, spilled registers among them.
        spill_bytes: stores and loads of registers that did not suffice.
        opcodes: of its instructions in order, without padding.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    opcodes: tuple[str, ...]

    @property
    def path(self) -> int:
        """Instructions before its last exit: not those of divisions and roots of extraordinary numbers behind it."""
        return len(self.opcodes) - self.opcodes[::-1].index("EXIT")


def missing() -> str | None:
    """What is not installed, None where nothing is."""
    for package in (PACKAGE, "nvidia-cuda-nvdisasm"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed: pip install 'kvstored[dev]'"
    return None


def compiler_version() -> str:
    """Version of NVRTC's package."""
    return metadata.version(PACKAGE)


@functools.cache
def compile_kernels(source: str, options: tuple[str, ...]) -> tuple[dict[str, KernelFacts], str]:
    """Compile a program; facts of its kernels by name, and the warnings.

    Raises:
        AssertionError: it does not compile; with the compiler's messages.
    """
    cubin, log = _compile(source, (*options, "-Xptxas=-v"))
    opcodes = _opcodes(cubin)
    facts, name, sizes = {}, "", [0, 0, 0]
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
        elif "spill stores" in line:
            sizes = [int(size) for size in re.findall(r"(\d+) bytes", line)]
        elif found := re.search(r"Used (\d+) registers", line):
            facts[name] = KernelFacts(int(found[1]), sizes[0], sizes[1] + sizes[2], opcodes[name])
    return facts, "\n".join(line for line in log.splitlines() if "warning" in line)


def _compile(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    nvrtc = _library()
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        result = nvrtc.nvrtcCompileProgram(program, len(options), given)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        _check(result, log)
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: ctypes._CFuncPtr, copy: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "")
    buffer = ctypes.create_string_buffer(size.value)
    _check(copy(program, buffer), "")
    return buffer.raw


def _check(result: int, log: str) -> None:
    if result:
        message = _library().nvrtcGetErrorString(result).decode()
        raise AssertionError(f"{message}\n{log[:4000]}")


@functools.cache
def _library() -> ctypes.CDLL:
    libraries = {
        path.name: path for path in _files(PACKAGE) if re.fullmatch(r"libnvrtc(-builtins)?\.so\.[\d.]+", path.name)
    }
    # The compiler opens its built-in functions by name: they must be loaded first.
    for name in sorted(libraries, key=lambda name: "builtins" not in name):
        library = ctypes.CDLL(str(libraries[name]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _opcodes(cubin: bytes) -> dict[str, tuple[str, ...]]:
    disassembler = next(path for path in _files("nvidia-cuda-nvdisasm") if path.name == "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = {}
    for part in re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"\w+", part)
        assert name
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", part)
        found[name[0]] = tuple(opcode for opcode in instructions if opcode != "NOP")
    return found


def _files(package: str) -> list[Path]:
    return [Path(str(file.locate())) for file in metadata.files(package) or []]
