"""Build of the optional C++ extension ``engine.kernels._cpu``; everything else is in pyproject.toml."""

import os
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

BUILD_ERRORS = (BaseError, CCompilerError, OSError)
OPENMP_PROBE = """
#include <omp.h>
int threads() {
  int n = 0;
#pragma omp parallel reduction(+ : n)
  n += omp_get_num_threads() > 0;
  return n;
}
"""


class BuildKernels(build_ext):
    """Builds the extension if it can; the engine works without it."""

    def run(self) -> None:
        self.left_out: list[Extension] = []
        super().run()
        for extension in self.left_out if self.inplace else []:
            # a file of an earlier build would be loaded with Python code that it does not belong to
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    def build_extension(self, extension: Extension) -> None:
        if os.environ.get("DIFFPO_NO_EXTENSION", "0") not in ("", "0"):
            self.leave_out(extension, "DIFFPO_NO_EXTENSION is set")
            return
        try:
            if self.has_openmp():
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
            super().build_extension(extension)
        except BUILD_ERRORS as error:
            self.leave_out(extension, str(error))

    def has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "probe.so")), extra_postargs=["-fopenmp"], target_lang="c++"
                )
            except BUILD_ERRORS:
                return False
        return True

    def leave_out(self, extension: Extension, reason: str) -> None:
        self.left_out.append(extension)
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        print(
            "diffpo-engine: the C++ CPU kernels were NOT built; on CPU the engine will use the slower PyTorch fallback "
            f"({reason})",
            file=sys.stderr,
        )


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "engine.kernels._cpu",
            sources=sorted(glob("csrc/*.cpp")),
            depends=["setup.py", *sorted(glob("csrc/*.h"))],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            language="c++",
            # No -march: each instruction set has its own file with target pragmas, chosen at run time.
            extra_compile_args=["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden"],
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
