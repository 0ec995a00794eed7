"""Shared libraries: what they need, and where they look for it."""

import os
import pathlib
import struct
import subprocess
import sys

MACOS = sys.platform == "darwin"

# Libraries of the system, which every program has already.
SYSTEM = ("linux-vdso", "ld-linux", "libc.so", "libm.so", "libgcc_s.so", "libstdc++.so", "libpthread.so", "libdl.so", "librt.so")

DT_NEEDED, DT_STRTAB, DT_SONAME, DT_RPATH, DT_RUNPATH = 1, 5, 14, 15, 29
PT_LOAD, PT_DYNAMIC = 1, 2
SHT_DYNSYM = 11


class Unexpected(Exception):
    """A library is not what this script knows how to handle."""


class Elf:
    """The dynamic section of a 64-bit little-endian ELF file."""

    def __init__(self, path):
        self.path = path
        self.data = bytearray(path.read_bytes())
        if self.data[:6] != b"\x7fELF\x02\x01":
            raise Unexpected(f"{path} is no 64-bit little-endian ELF file")
        self.segments = list(self._table(32, 54, "<IIQQQQQQ"))
        self.strings = self._offset(self._entry(DT_STRTAB))

    def _table(self, place, sizes, layout):
        """Entries of the program or section headers, whose place and sizes are in the file's header."""
        (start,) = struct.unpack_from("<Q", self.data, place)
        size, count = struct.unpack_from("<HH", self.data, sizes)
        for at in range(start, start + size * count, size):
            yield struct.unpack_from(layout, self.data, at)

    def _dynamic(self):
        """Tags and values."""
        for kind, _, offset, _, _, size, _, _ in self.segments:
            if kind == PT_DYNAMIC:
                yield from struct.iter_unpack("<QQ", self.data[offset : offset + size])

    def _entry(self, wanted):
        for tag, value in self._dynamic():
            if tag == wanted:
                return value
        raise Unexpected(f"{self.path} lacks the dynamic entry {wanted}")

    def _offset(self, address):
        """Where in the file an address is."""
        for kind, _, offset, start, _, size, _, _ in self.segments:
            if kind == PT_LOAD and start <= address < start + size:
                return offset + address - start
        raise Unexpected(f"{self.path} has nothing at {address:#x}")

    def _text(self, value):
        at = self.strings + value
        return self.data[at : self.data.index(0, at)].decode()

    def name(self):
        return self._text(self._entry(DT_SONAME))

    def needed(self):
        return [self._text(value) for tag, value in self._dynamic() if tag == DT_NEEDED]

    def run_paths(self):
        """Offset in the table of strings, and text."""
        return [(value, self._text(value)) for tag, value in self._dynamic() if tag in (DT_RPATH, DT_RUNPATH)]

    def _used(self):
        """Offsets of all other strings: linkers let one be the end of another."""
        for tag, value in self._dynamic():
            if tag in (DT_NEEDED, DT_SONAME):
                yield value
        for section in self._table(40, 58, "<IIQQQQIIQQ"):
            if section[1] == SHT_DYNSYM:
                offset, size = section[4], section[5]
                for name, *_ in struct.iter_unpack("<IBBHQQ", self.data[offset : offset + size]):
                    yield name

    def shorten_run_paths(self, text):
        """Replaces all run paths by `text` in their own place, which must be large enough."""
        for value, old in self.run_paths():
            if len(text) > len(old):
                raise Unexpected(f"{self.path}: no room for the run path {text} in the place of {old}")
            if any(value < used <= value + len(old) for used in self._used()):
                raise Unexpected(f"{self.path}: the run path {old} is a part of another name")
            at = self.strings + value
            self.data[at : at + len(old)] = text.encode().ljust(len(old), b"\0")
        self.path.write_bytes(self.data)


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def own_name(library):
    """The name by which programs look for a library."""
    if not MACOS:
        return Elf(library).name()
    return output("otool", "-D", str(library)).split()[-1].removeprefix("@rpath/")


def _places(path):
    """Folders where a library looks for others, and their names."""
    if not MACOS:
        elf = Elf(path)
        folders = [folder for _, text in elf.run_paths() for folder in text.split(":")]
        return [folder.replace("$ORIGIN", str(path.parent)) for folder in folders], elf.needed()
    lines = [line.split() for line in output("otool", "-l", str(path)).splitlines()]
    rpaths = [lines[at + 2][1] for at, line in enumerate(lines) if line[-1:] == ["LC_RPATH"]]
    names = [line.split()[0] for line in output("otool", "-L", str(path)).splitlines()[2:]]
    folders = [folder.replace("@loader_path", str(path.parent)) for folder in rpaths]
    return folders, [name.removeprefix("@rpath/") for name in names if name.startswith("@rpath/")]


def closure(library):
    """All files that `library` needs, directly or not, but for the system's. On macOS also MLX's kernels."""
    found, waiting = [], [library]
    while waiting:
        folders, names = _places(waiting.pop())
        for name in names:
            if name.startswith(SYSTEM) or any(name == file.name for file in found):
                continue
            candidates = [pathlib.Path(os.path.normpath(folder), name) for folder in folders]
            file = next((candidate for candidate in candidates if candidate.is_file()), None)
            if file is None:
                raise Unexpected(f"{name} is in none of {', '.join(folders) or 'no folder'}")
            found.append(file)
            waiting.append(file)
    return found + [file.with_name("mlx.metallib") for file in found if file.name == "libmlx.dylib"]


def make_relative(path):
    """Has a library look for others in its own folder, and nowhere else."""
    if path.suffix == ".metallib":
        return
    if not MACOS:
        Elf(path).shorten_run_paths("$ORIGIN")
        return
    folders, _ = _places(path)
    lines = [line.split() for line in output("otool", "-l", str(path)).splitlines()]
    for old in [lines[at + 2][1] for at, line in enumerate(lines) if line[-1:] == ["LC_RPATH"]]:
        output("install_name_tool", "-delete_rpath", old, str(path))
    output("install_name_tool", "-add_rpath", "@loader_path", str(path))
    # Changed files need a new signature.
    output("codesign", "--force", "--sign", "-", str(path))


def strip(path):
    """Removes what only debuggers read."""
    output("strip", *(["-S", "-x"] if MACOS else ["--strip-unneeded"]), str(path))
