"""The licences of everything that an installation holds."""

import json
import os
import pathlib
import shutil
import subprocess

NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT", "UNLICENSE")

# Licences of what a wheel of MLX brings besides MLX, by the beginning of the file's name.
BROUGHT = {
    "libblas": ["lapack.txt"],
    "liblapack": ["lapack.txt"],
    "libgfortran": ["gcc-runtime.txt", "GPL-3.txt"],
    "libquadmath": ["gcc-runtime.txt", "LGPL-2.1.txt"],
}

# Packages of this repository in the library or in programs that hold it, and the texts of what they compile besides our own.
OWN = {
    "mlx-sys": ["mlx-c.txt"],
    "omlx": [],
    "omlx-client": [],
    "omlx-kernels-cpu": [],
}


class Missing(Exception):
    """Something would be installed without its licence."""


def _output(*command, folder=None):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout


def _metadata(folder):
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", _host()]
    return json.loads(_output(*command, folder=folder))


def _linked_crates(root, name):
    """The packages whose code is in the library or program of that name: reached from it by other than build and test dependencies."""
    metadata = _metadata(root)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    own = next(id for id, p in packages.items() if p["name"] == name and p["source"] is None)
    reached, waiting = set(), [own]
    while waiting:
        for dependency in nodes[waiting.pop()]["deps"]:
            normal = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            procedural = any("proc-macro" in t["kind"] for t in packages[dependency["pkg"]]["targets"])
            if normal and not procedural and dependency["pkg"] not in reached:
                reached.add(dependency["pkg"])
                waiting.append(dependency["pkg"])
    return sorted((packages[id] for id in reached), key=lambda p: (p["name"], p["version"]))


def _host():
    return next(line.split()[1] for line in _output("rustc", "-vV").splitlines() if line.startswith("host: "))


def _texts(folder):
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name.upper().startswith(NAMES)]
    return [(file.name, file.read_text(errors="replace").strip()) for file in files]


def _own(package):
    """The line of a package of this repository."""
    if package["name"] not in OWN:
        raise Missing(f"no licence is known for what the package {package['name']} has; see packaging/licenses.py")
    return f"{package['name']} {package['version']}: a part of libomlx: {', '.join(['LICENSE'] + OWN[package['name']])}"


def _mlx_c(root):
    """The sources of mlx-c, where the build has them from."""
    if os.environ.get("MLX_C_ROOT"):
        return pathlib.Path(os.environ["MLX_C_ROOT"])
    packages = _metadata(root / "bindings/mlx-sys/mlx-c-source")["packages"]
    manifest = next(p["manifest_path"] for p in packages if p["name"] == "mlx-sys" and p["source"])
    return pathlib.Path(manifest).parent / "src/mlx-c"


def _standard_library():
    """What the toolchain says of Rust's standard library, and of the crates in it."""
    text = pathlib.Path(_output("rustc", "--print", "sysroot").strip(), "share/doc/rust/COPYRIGHT-library.html")
    if not text.is_file():
        raise Missing(f"the licences of Rust's standard library are not in {text}, where rustup has them")
    return text


def _crates(root, name):
    """One text with the licences of all crates; equal ones once. Crates without a text have their licence's name."""
    title = "libomlx" if name == "omlx" else name
    parts = [f"The Rust crates in {title}, their licences, and the texts of these.\n"]
    known = {}
    for package in _linked_crates(root, name):
        if package["source"] is None:
            parts.append(_own(package))
            continue
        texts = _texts(pathlib.Path(package["manifest_path"]).parent)
        if not texts and not package["license"]:
            raise Missing(f"the crate {package['name']} has no licence")
        authors = ", ".join(package["authors"]) or package["repository"] or "its authors"
        parts.append(f"{package['name']} {package['version']}: {package['license'] or 'see its text'} ({authors})")
        for name, text in texts:
            parts.append(f"    {name}: text {known.setdefault(text, len(known) + 1)}")
    for text, number in known.items():
        parts.append(f"\n{'-' * 100}\nText {number}\n\n{text}")
    return "\n".join(parts) + "\n"


def install(root, libraries, target, name="omlx"):
    """Writes the licences of libomlx (or of the program `name`), of what is compiled into it, and of `libraries` to the folder
    `target`."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "LICENSE", target / "LICENSE")
    (target / "rust-crates.txt").write_text(_crates(root, name))
    shutil.copyfile(_mlx_c(root) / "LICENSE", target / "mlx-c.txt")
    shutil.copyfile(_standard_library(), target / "rust-standard-library.html")
    for library in libraries:
        if library.name.startswith("libmlx.") or library.suffix == ".metallib":
            # <wheel>/mlx/lib/libmlx.so; its licence is in <wheel>/mlx_cpu-0.32.2.dist-info/licenses.
            found = sorted(library.parents[2].glob("mlx*.dist-info/**/LICENSE*"))
            if not found:
                raise Missing(f"the licence of {library} is not where a wheel has it")
            shutil.copyfile(found[0], target / "mlx.txt")
            continue
        names = next((names for start, names in BROUGHT.items() if library.name.startswith(start)), None)
        if names is None:
            raise Missing(f"no licence is known for {library.name}; see packaging/licenses.py")
        for name in names:
            shutil.copyfile(root / "packaging/licenses" / name, target / name)
