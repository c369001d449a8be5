"""Build policy: decides what to build and explains what is missing. CMakeLists.txt knows how to build it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
# The first toolkit release that knows an architecture; for any other the compiler itself must say.
FIRST_NVCC = {"9.0": (11, 8), "10.0": (12, 8), "12.0": (12, 8), "10.3": (12, 9), "12.1": (12, 9)}
NO_TORCH = """pyglow_fast compiles against the torch it will run beside, and torch cannot be imported here ({}).
Install it first, without isolation:  pip install torch && pip install --no-build-isolation .
or set PYGLOW_NO_EXTENSION=1 to install without the compiled kernels."""
LEAST_TORCH = "2.11"


def switch(name: str) -> str:
    """The value of a three-way environment switch: unset or auto, 0, 1."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}: expected auto, 0 or 1, found {value!r}")
    return value


def missing_for_extension() -> str:
    """What this machine lacks to compile anything at all, in words; empty when nothing is missing."""
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found: {', '.join(compilers)} (on Debian: apt-get install g++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the headers of this Python were not found (on Debian: apt-get install python3-dev)"
    return ""


def extensions() -> list[setuptools.Extension]:
    """The extension, or nothing where it is unwanted (PYGLOW_NO_EXTENSION=1) or cannot be built; 0 makes it a must."""
    unwanted, missing = switch("PYGLOW_NO_EXTENSION"), missing_for_extension()
    if unwanted == "0" and missing:
        sys.exit(f"pyglow_fast: PYGLOW_NO_EXTENSION=0 asks for the compiled extension, but {missing}")
    if unwanted == "1" or missing:
        note = "pyglow_fast is built WITHOUT its compiled kernels and will run on the slow torch reference"
        print(f"\n{'*' * 90}\n{note}:\n{missing or 'PYGLOW_NO_EXTENSION=1'}\n{'*' * 90}\n", file=sys.stderr)
        return []
    return [setuptools.Extension("pyglow_fast._C", [])]


def torch_has_cuda() -> bool:
    """Whether the torch that is installed was built for CUDA; beside another one the CUDA kernels are of no use."""
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


def cuda_compiler() -> tuple[str, tuple[int, int]] | None:
    """The nvcc that compiles the CUDA kernels and its release, such as (12, 8); None where they are not built."""
    wanted = switch("PYGLOW_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if wanted == "0" or (wanted == "auto" and (nvcc is None or not torch_has_cuda())):
        return None
    if nvcc is None:
        sys.exit(
            f"PYGLOW_CUDA=1 asks for the CUDA kernels, but no nvcc was found on PATH or in {home}/bin (CUDA_HOME).\n"
            "Install the CUDA toolkit (12.8 or newer), or set PYGLOW_CUDA=0 to build the CPU kernels only."
        )
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        sys.exit(f"{nvcc} --version does not work ({error}): set CUDA_HOME to the toolkit's folder, or PYGLOW_CUDA=0")
    return nvcc, (int(major), int(minor))


def cuda_options() -> list[str]:
    """CMake's options for CUDA; refuses an nvcc that cannot compile the architectures before the compiler does."""
    found = cuda_compiler()
    if found is None:
        return ["-DPYGLOW_NVCC="]
    nvcc, version = found
    archs = []
    for name in filter(None, re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)):
        parts = re.fullmatch(r"((\d+)\.(\d))([af]?)(\+PTX)?", name)
        if parts is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as {DEFAULT_ARCHS}, found {name!r}")
        if version < (needed := FIRST_NVCC.get(parts[1], (0, 0))):
            sys.exit(
                f"{nvcc} is CUDA {version[0]}.{version[1]}, but architecture {name} needs {needed[0]}.{needed[1]} or "
                "newer.\nPoint CUDA_HOME at a newer toolkit, or name only older architectures in TORCH_CUDA_ARCH_LIST, "
                "or set PYGLOW_CUDA=0 to build the CPU kernels only."
            )
        archs.append(parts[2] + parts[3] + parts[4] + ("" if parts[5] else "-real"))  # without PTX: machine code only
    return [f"-DPYGLOW_NVCC={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}"]


def source_version() -> str:
    """The version of the sources, which pyglow_fast/__init__.py alone has."""
    text = (ROOT / "pyglow_fast" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def built_for(compiled: bool) -> tuple[str, str]:
    """The requirement of torch, and what the version's local label says of the build if PYGLOW_WHEEL_LABEL=1.

    Compiled kernels work beside the minor version of torch that they were compiled for, so the wheel asks for that:
    torch==2.13.*, and +cputorch2.13 or +cu128torch2.13. Sources and a wheel without kernels take any torch that is new
    enough, and have no label.
    """
    try:
        torch = re.match(r"\d+\.\d+", importlib.metadata.version("torch")).group() if compiled else ""
    except importlib.metadata.PackageNotFoundError:  # an isolated build asks for metadata; it will not compile
        torch = ""
    if not torch:
        return f"torch>={LEAST_TORCH}", ""
    if switch("PYGLOW_WHEEL_LABEL") != "1":
        return f"torch=={torch}.*", ""
    cuda = cuda_compiler()
    kernels = "cpu" if cuda is None else "cu{}{}".format(*cuda[1])
    return f"torch=={torch}.*", f"+{kernels}torch{torch}"


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, in a folder per interpreter and torch that is kept between builds."""

    def build_extension(self, ext: setuptools.Extension) -> None:
        # A virtual environment's tools count even if it is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if cmake is None:
            sys.exit("pyglow_fast needs CMake 3.24 or newer to compile: pip install cmake ninja")
        try:
            import torch
        except ImportError as error:
            sys.exit(NO_TORCH.format(error))
        tool = "ninja" if ninja else "make"
        folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}-{tool}"
        options = {
            "Python_EXECUTABLE": sys.executable,
            "PYGLOW_VERSION": self.distribution.get_version(),
            "PYGLOW_TORCH_DIR": Path(torch.__file__).parent,
            "PYGLOW_TORCH_VERSION": torch.__version__,
            "PYGLOW_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        }
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call([cmake, "-S", ROOT, "-B", folder, *generator, *defines, *cuda_options()])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call([cmake, "--build", folder, "--parallel", jobs])
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        subprocess.check_call([cmake, "--install", folder, "--prefix", prefix, "--strip"])


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:
        sys.exit(f"setuptools {setuptools.__version__} is too old: pip install --upgrade setuptools wheel cmake ninja")
    modules = extensions()
    torch_requirement, label = built_for(compiled=bool(modules) and "sdist" not in sys.argv)
    setuptools.setup(
        version=source_version() + label,
        install_requires=[torch_requirement, "numpy>=2.1", "safetensors>=0.5"],
        ext_modules=modules,
        cmdclass={"build_ext": CMakeBuild},
    )
