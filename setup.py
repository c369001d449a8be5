"""Build policy: decides what to build and explains what is missing. CMakeLists.txt knows how to build it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
# The first toolkit release that knows an architecture; anything newer than these needs whatever nvcc says.
FIRST_NVCC = {"9.0": (11, 8), "10.0": (12, 8), "12.0": (12, 8), "10.3": (12, 9), "12.1": (12, 9)}


def switch(name: str) -> str:
    """The value of a three-way environment switch: unset or auto, 0, 1."""
    value = os.environ.get(name, "") or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}: expected auto, 0 or 1, found {value!r}")
    return value


def find_tool(name: str) -> str | None:
    """Looks beside the interpreter first: a virtual environment's tools count even when it is not activated."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def missing_for_extension() -> str:
    """What this machine lacks to compile anything at all, in words; empty when nothing is missing."""
    compiler = os.environ.get("CXX", "").split()
    if not any(shutil.which(c) for c in ([compiler[0]] if compiler else ["c++", "g++", "clang++"])):
        return "no C++ compiler was found (on Debian: apt-get install g++; another one can be named by CXX)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the Python headers were not found (on Debian: apt-get install python3-dev)"
    return ""


def extensions() -> list[Extension]:
    """The extension, or nothing where it is unwanted (PYGLOW_NO_EXTENSION=1) or cannot be built; 0 makes it a must."""
    unwanted, missing = switch("PYGLOW_NO_EXTENSION"), missing_for_extension()
    if unwanted == "1" or (missing and unwanted == "auto"):
        why = missing or "PYGLOW_NO_EXTENSION=1"
        note = "pyglow_fast is installed WITHOUT its compiled kernels and will run on the slow torch reference backend"
        print(f"\n{'*' * 78}\n{note}:\n{why}\n{'*' * 78}\n", file=sys.stderr)
        return []
    if missing:
        sys.exit(f"pyglow_fast: PYGLOW_NO_EXTENSION=0 asks for the compiled extension, but {missing}")
    return [Extension("pyglow_fast._C", [])]


def torch_options() -> tuple[list[str], str]:
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"pyglow_fast compiles against the torch it will run beside, and torch cannot be imported here ({error}).\n"
            "Install torch first, then build without isolation:\n"
            "    pip install torch && pip install --no-build-isolation .\n"
            "or set PYGLOW_NO_EXTENSION=1 to install without the compiled kernels."
        )
    options = {
        "TORCH_DIR": Path(torch.__file__).parent,
        "TORCH_VERSION": torch.__version__,
        "CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
    }
    return [f"-DPYGLOW_{key}={value}" for key, value in options.items()], torch.__version__


def cuda_options() -> list[str]:
    """Chooses nvcc and the architectures, and refuses an nvcc that cannot compile them before the compiler does."""
    wanted = switch("PYGLOW_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if wanted == "0" or (nvcc is None and wanted == "auto"):
        return ["-DPYGLOW_NVCC="]
    if nvcc is None:
        sys.exit(
            f"PYGLOW_CUDA=1 asks for the CUDA kernels, but no nvcc was found on PATH or in {home}/bin (CUDA_HOME).\n"
            "Install the CUDA toolkit (12.8 or newer), or set PYGLOW_CUDA=0 to build the CPU kernels only."
        )
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{nvcc} does not run ({error}). Set CUDA_HOME to the toolkit's folder, or PYGLOW_CUDA=0.")
    found = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    names = [name for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS) if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as {DEFAULT_ARCHS}, found {name!r}")
        needed = FIRST_NVCC.get(name.removesuffix("+PTX").rstrip("af"), (0, 0))
        if version < needed:
            sys.exit(
                f"{nvcc} is CUDA {version[0]}.{version[1]}, but architecture {name} needs {needed[0]}.{needed[1]} or "
                "newer.\nPoint CUDA_HOME at a newer toolkit, or name only older architectures in TORCH_CUDA_ARCH_LIST, "
                "or set PYGLOW_CUDA=0 to build the CPU kernels only."
            )
    # CMake's spelling: 90-real is machine code only; a bare 120 is machine code and PTX for later GPUs.
    archs = [re.sub(r"\.", "", n.removesuffix("+PTX")) + ("" if n.endswith("+PTX") else "-real") for n in names]
    return [f"-DPYGLOW_NVCC={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}"]


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, in a folder per interpreter and torch that is kept between builds."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            sys.exit("pyglow_fast needs CMake 3.24 or newer to compile: pip install cmake ninja")
        torch, version = torch_options()
        tag = f"{sysconfig.get_config_var('SOABI')}-torch-{version}"
        folder = ROOT / "build" / f"{tag}-{'ninja' if ninja else 'make'}"
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release", *generator]
        subprocess.check_call([cmake, "-S", ROOT, "-B", folder, *options, *torch, *cuda_options()])
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.check_call([cmake, "--build", folder, "--parallel", jobs])
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        subprocess.check_call([cmake, "--install", folder, "--prefix", prefix, "--strip"])


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:
        sys.exit(f"setuptools {setuptools.__version__} is too old: pip install --upgrade 'setuptools>=77' wheel cmake ninja")
    setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
