"""The installation, in environments of its own: with and without a C++ compiler, next to Hugging Face's ``kernels``."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
OURS = re.compile(r"(diffpo_engine|__editable__|engine$|kernels)")  # hidden from the environments under test
VARIABLES_IN_THE_WAY = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "DIFFPO_NO_EXTENSION", "DIFFPO_CPU_KERNELS")

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")),
    reason="no C++ compiler on this machine",
)


def run(command: list[str], cwd: Path, variables: Mapping[str, str] = {}, timeout: float = 600) -> str:
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES_IN_THE_WAY} | dict(variables)
    done = subprocess.run(
        command, cwd=cwd, env=env, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-8000:]}"
    return done.stdout


class Environment:
    """A virtual environment that also sees the libraries of the current one, but not this project."""

    def __init__(self, folder: Path, libraries: Path, pip_variables: Mapping[str, str], pip_options: list[str]) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.bin = folder / "bin"
        self.pip_variables, self.pip_options = pip_variables, pip_options
        self.site_packages = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))", folder).strip())
        (self.site_packages / "libraries.pth").write_text(f"{libraries}\n")

    def python(self, code: str, cwd: Path, variables: Mapping[str, str] = {}) -> str:
        return run([str(self.bin / "python"), "-c", code], cwd, variables)

    def pip(self, *arguments: str, cwd: Path, variables: Mapping[str, str] = {}) -> str:
        command = [str(self.bin / "python"), "-m", "pip", "-v", *arguments, "--no-deps", *self.pip_options]
        return run(command, cwd, {**self.pip_variables, **variables})

    def look(self, cwd: Path) -> tuple[Path, bool, str]:
        """File of engine.kernels, whether the extension is there, and the CPU kernels in use."""
        code = """if True:
            import importlib.util, json
            import engine, engine.kernels
            there = importlib.util.find_spec("engine.kernels._cpu") is not None
            print("\\n" + json.dumps([engine.kernels.__file__, there, engine.kernels.native_name()]))
        """
        file, there, name = json.loads(self.python(code, cwd).splitlines()[-1])
        return Path(file).resolve(), there, name


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to what is installed here, less this project and any ``kernels``."""
    folder = tmp_path_factory.mktemp("libraries")
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.origin).parents[1])}
    for entry in (entry for place in sorted(places) for entry in Path(place).iterdir()):
        if not OURS.match(entry.name) and entry.suffix != ".pth" and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the distributions setuptools and kernels, as far as pip can reach an index."""
    folder = tmp_path_factory.mktemp("downloads")
    for name in ("setuptools>=77", "kernels"):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=0"]
        try:
            run([*command, "--timeout=10", "--dest", str(folder), name], folder, timeout=60)
        except (AssertionError, subprocess.TimeoutExpired):
            break
    return folder


@pytest.fixture(scope="module")
def new_environment(
    libraries: Path, downloads: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Environment]:
    """Builds are isolated, with setuptools alone to be had; without an index they use the setuptools installed here."""
    isolated = any(downloads.glob("setuptools-*"))
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(downloads), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    options = [] if isolated else ["--no-build-isolation"]
    return lambda: Environment(tmp_path_factory.mktemp("environment"), libraries, variables, options)


@pytest.fixture(scope="module")
def new_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    def copy() -> Path:
        target = tmp_path_factory.mktemp("checkout") / "source"
        return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_SOURCE))).resolve()

    return copy


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def without_compiler(environment: Environment, how: str) -> dict[str, str]:
    if how == "broken":
        false = shutil.which("false") or "/nonexistent/compiler"
        return {"CC": false, "CXX": false}
    if how == "opted-out":
        return {"DIFFPO_NO_EXTENSION": "1"}
    return {"PATH": str(environment.bin), "CC": "cc", "CXX": "c++"}


@needs_compiler
@pytest.mark.parametrize("options", [["."], ["-e", "."]], ids=["regular", "editable"])
def test_install_builds_the_extension(
    options: list[str], new_environment: Callable[[], Environment], new_source: Callable[[], Path], outside: Path
) -> None:
    environment, source = new_environment(), new_source()
    output = environment.pip("install", *options, cwd=source)
    file, there, name = environment.look(outside)
    home = source / "kernels" if "-e" in options else environment.site_packages.resolve() / "engine" / "kernels"
    assert file == home / "__init__.py"
    assert there
    assert name != "torch"
    assert "NOT built" not in output


@pytest.mark.parametrize("how", ["missing", "broken", "opted-out"])
@pytest.mark.parametrize("options", [["."], ["-e", "."]], ids=["regular", "editable"])
def test_install_without_compiler_succeeds_and_says_so(
    options: list[str],
    how: str,
    new_environment: Callable[[], Environment],
    new_source: Callable[[], Path],
    outside: Path,
) -> None:
    environment, source = new_environment(), new_source()
    earlier = source / "kernels" / "_cpu.abi3.so"
    earlier.write_bytes(b"from an earlier build, which must not be used")
    output = environment.pip("install", *options, cwd=source, variables=without_compiler(environment, how))
    assert "CPU kernels were NOT built; on CPU the engine will use the slower PyTorch fallback" in output
    assert environment.look(outside)[1:] == (False, "torch")
    assert earlier.exists() == ("-e" not in options)


@needs_compiler
def test_wheel_built_from_the_sdist_holds_exactly_the_packages(
    new_environment: Callable[[], Environment], new_source: Callable[[], Path], tmp_path: Path
) -> None:
    environment, source = new_environment(), new_source()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    environment.python(code, source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"csrc/{file.name}" for file in (source / "csrc").iterdir()}
    assert csrc | {"setup.py", "pyproject.toml", "LICENSE"} <= in_sdist

    environment.pip("wheel", "--wheel-dir", str(tmp_path), str(sdist), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name  # one wheel for every supported Python
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(source).as_posix() for path in source.glob("engine/**/*") if path.is_file()}
    sources |= {f"engine/{path.relative_to(source).as_posix()}" for path in source.glob("kernels/**/*.py")}
    assert files == sources | {"engine/kernels/_cpu.abi3.so"}
    assert "engine/py.typed" in files

    checkpoint = {name.rpartition("/")[2] for name in files if name.startswith("engine/refiner_checkpoint/")}
    assert {"README.md", "config.json", "tokenizer.json"} <= checkpoint
    assert any(name.endswith(".safetensors") for name in checkpoint)


# What transformers takes from Hugging Face's package, for machines where pip can reach no index.
STAND_IN = """
def use_kernel_forward_from_hub(name):
    return lambda cls: cls

def use_kernelized_func(*functions):
    return lambda cls: cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


def install_stand_in(environment: Environment) -> None:
    """A distribution ``kernels`` of a version that the installed transformers uses."""
    code = "from transformers.utils import import_utils as u; print(getattr(u, 'KERNELS_MIN_VERSION', '1.0'))"
    version = environment.python(code, environment.folder).split()[-1]
    package = environment.site_packages / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    information = environment.site_packages / f"kernels-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (information / "RECORD").write_text("kernels/__init__.py,,\n")


IMPORTS = """if True:
    import json
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.integrations import hub_kernels
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.utils.import_utils import is_kernels_available
    import engine.kernels
    try:
        import kernels
        file = getattr(kernels, "__file__", None)
    except ImportError:
        file = None
    print("\\n" + json.dumps([file, is_kernels_available(), engine.kernels.__file__]))
"""


@pytest.mark.parametrize("whose", ["published", "stand-in"])
def test_kernels_outside_the_checkout_is_hugging_faces(
    whose: str,
    new_environment: Callable[[], Environment],
    new_source: Callable[[], Path],
    downloads: Path,
    outside: Path,
) -> None:
    environment = new_environment()
    if whose == "stand-in":
        install_stand_in(environment)
    elif any(downloads.glob("kernels-*")):
        environment.pip("install", "kernels", cwd=outside)
    else:
        pytest.skip("pip can reach no index")
    theirs = environment.site_packages / "kernels" / "__init__.py"
    before = theirs.read_bytes()
    environment.pip("install", ".", cwd=new_source(), variables={"DIFFPO_NO_EXTENSION": "1"})
    assert theirs.read_bytes() == before
    file, available, ours = json.loads(environment.python(IMPORTS, outside).splitlines()[-1])
    assert Path(file) == theirs
    assert available or whose == "published"  # the published version may be one that this transformers does not use
    assert Path(ours) == environment.site_packages / "engine" / "kernels" / "__init__.py"


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "absent"])
def test_transformers_works_in_the_checkout(
    installed: bool, new_environment: Callable[[], Environment], new_source: Callable[[], Path]
) -> None:
    """The current folder comes first on sys.path, so that transformers looking for ``kernels`` meets our folder."""
    environment, source = new_environment(), new_source()
    if installed:
        install_stand_in(environment)
    environment.pip("install", "-e", ".", cwd=source, variables={"DIFFPO_NO_EXTENSION": "1"})
    file, available, ours = json.loads(environment.python(IMPORTS, source).splitlines()[-1])
    assert available == installed
    if installed:
        assert Path(file) == environment.site_packages / "kernels" / "__init__.py"
    assert Path(ours) == source / "kernels" / "__init__.py"
