"""Kernels for ARM: cross-compiled by zig, and run in Unicorn, which is QEMU's processor as a library."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from unicorn import UC_ARCH_ARM64, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm

ROOT = Path(__file__).parents[2]
# As in csrc/CMakeLists.txt, in the words of zig.
FLAGS = {
    "neon": ("-mcpu=generic", "-DFASTBERT_NEON"),
    "neon_dot": ("-mcpu=generic+dotprod", "-DFASTBERT_NEON"),
    "neon_bf16": ("-mcpu=generic+dotprod+bf16", "-DFASTBERT_NEON"),
    "portable": (),
}
COMPILE = (
    *("-std=c++17", "-O2", "-fno-math-errno", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Wno-unused-const-variable"),  # of the members of a kind, some are used
)
LINK = ("-nostdlib", "-static", "-Wl,-e,0", "-Wl,--no-gc-sections")
PAGE = 4096
MEMORY, SIZE, STACK, RETURN = 0x10_0000_0000, 256 << 20, 0x20_0000_0000, 0x30_0000_0000


def compile_kernels(isa: str, folder: Path) -> Path:
    """A program without an entry, of the row kernels of one instruction set and the functions of entry.cpp."""
    csrc = ROOT / "csrc"
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", *COMPILE, *FLAGS[isa]]
    compiler += [f"-DFASTBERT_ISA={isa}", "-DFASTBERT_ARM", f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}"]
    sources = [*sorted((csrc / "cpu" / "simd").glob("*_rows.cpp")), Path(__file__).with_name("entry.cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running: list[subprocess.Popen] = []
    for source, target in zip(sources, objects, strict=True):
        if len(running) == 2:
            finish(running.pop(0))
        running.append(subprocess.Popen([*compiler, "-c", str(source), "-o", str(target)], stderr=subprocess.PIPE))
    for process in running:
        finish(process)
    program = folder / "kernels.elf"
    link = [
        *compiler,
        "-nostdlib",
        "-static",
        "-Wl,-e,0",
        "-Wl,--no-gc-sections",
        *map(str, objects),
        "-o",
        str(program),
    ]
    finish(subprocess.Popen(link, stderr=subprocess.PIPE))
    return program


def finish(process: subprocess.Popen) -> None:
    errors = process.communicate()[1].decode()
    assert process.returncode == 0, errors
    assert "warning" not in errors, errors


class Emulator:
    """A program in memory, whose functions take an array of numbers; tensors among them are copied in and out."""

    def __init__(self, program: Path) -> None:
        image = program.read_bytes()
        self.unicorn = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.unicorn.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        (programs, sections) = struct.unpack_from("<QQ", image, 32)
        top = 0
        for i in range(struct.unpack_from("<H", image, 56)[0]):
            kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from(
                "<IIQQQQQQ", image, programs + 56 * i
            )
            if kind == 1:  # PT_LOAD
                first = max(top, address // PAGE * PAGE)
                top = -(-(address + in_memory) // PAGE) * PAGE
                if top > first:
                    self.unicorn.mem_map(first, top - first)
                self.unicorn.mem_write(address, image[offset : offset + in_file])
        self.functions = dict(symbols(image, sections))
        for start, size in ((MEMORY, SIZE), (STACK, 1 << 20), (RETURN, PAGE)):
            self.unicorn.mem_map(start, size)
        enabled = self.unicorn.reg_read(arm.UC_ARM64_REG_CPACR_EL1) | 3 << 20  # floating point
        self.unicorn.reg_write(arm.UC_ARM64_REG_CPACR_EL1, enabled)

    def call(self, name: str, *arguments: int | Tensor | None) -> int:
        """Calls a function; the tensors have its results afterwards. Memory between them holds NaNs."""
        self.unicorn.mem_write(MEMORY, b"\xff" * (4 << 20))
        place, numbers, tensors = MEMORY + PAGE, [], []
        for argument in arguments:
            if isinstance(argument, Tensor):
                numbers.append(place)
                tensors.append((place, argument))
                self.unicorn.mem_write(place, bytes_of(argument))
                place = (place + argument.numel() * argument.element_size() + 256) // 64 * 64
            else:
                numbers.append(argument or 0)
        assert place < MEMORY + (4 << 20)
        self.unicorn.mem_write(MEMORY, struct.pack(f"<{len(numbers)}q", *numbers))
        self.unicorn.reg_write(arm.UC_ARM64_REG_X0, MEMORY)
        self.unicorn.reg_write(arm.UC_ARM64_REG_SP, STACK + (1 << 20))
        self.unicorn.reg_write(arm.UC_ARM64_REG_LR, RETURN)
        self.unicorn.emu_start(self.functions[name], RETURN)
        for place, tensor in tensors:
            found = np.frombuffer(self.unicorn.mem_read(place, tensor.numel() * tensor.element_size()), np.uint8)
            tensor.view(torch.uint8).copy_(torch.from_numpy(found.copy()).view(tensor.view(torch.uint8).shape))
        return self.unicorn.reg_read(arm.UC_ARM64_REG_X0)


def bytes_of(tensor: Tensor) -> bytes:
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).numpy().tobytes()


def symbols(image: bytes, sections: int) -> Sequence[tuple[str, int]]:
    """Names and addresses of an ELF file's functions."""
    size, count = struct.unpack_from("<HH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, sections + size * i) for i in range(count)]
    found = []
    for header in headers:
        if header[1] == 2:  # SHT_SYMTAB
            names = headers[header[6]][4]
            for at in range(header[4], header[4] + header[5], 24):
                name, info, _, _, address, _ = struct.unpack_from("<IBBHQQ", image, at)
                if info & 15 == 2:  # STT_FUNC
                    end = image.index(b"\0", names + name)
                    found.append((image[names + name : end].decode(), address))
    return found
