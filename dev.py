#!/usr/bin/env python3
"""Sets up a private environment in `.venv` and runs one job in it. Standard library only.

    python3 dev.py demo [arguments of heteroakd-train]    the main job on real data
    python3 dev.py experiment [its arguments]             every method, both directions, 10 seeds
    python3 dev.py bench [arguments of benchmarks]        the benchmark report of this machine
    python3 dev.py test [arguments of pytest]             lint, types, all tests, the speed gate
    python3 dev.py gpu [--minutes 6]                      everything that only a GPU can tell

Needs Python 3.10+ and a C++ compiler. The torch of the calling interpreter is used when it has
one (the environment then sees that interpreter's packages); otherwise a pinned one is installed.
Run again at any time: what is already in place is not done twice. The job `gpu` needs no network
and no environment: it takes torch, Triton and nvcc as the calling interpreter sees them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
BUILD_TOOLS = ["ninja>=1.11", "setuptools>=77", "wheel>=0.43"]


def find_torch() -> str | None:
    """Version of the calling interpreter's torch, if it is one we can use."""
    probe = "import torch; print(torch.__version__)"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if found.returncode != 0:
        return None
    version = found.stdout.strip()
    usable = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= (2, 10)
    return version if usable else None


class Environment:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = directory / scripts / ("python.exe" if os.name == "nt" else "python")

    def run(self, *command: str) -> None:
        """Runs Python with these arguments; ends with its exit code when it fails."""
        process = subprocess.Popen([str(self.python), *command], cwd=ROOT)
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # the job got it too, and takes its time to save its state
        if code != 0:
            raise SystemExit(code if code > 0 else 128 - code)

    def output(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs Python with these arguments, and keeps all that it prints."""
        return subprocess.run(
            [str(self.python), *command],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def pip(self, *arguments: str) -> None:
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)

    def prepare(self, extra: str) -> None:
        """Creates the environment and installs the package with one of its extras."""
        torch = find_torch()
        complete = self.directory / "created"  # absent where an earlier set-up was interrupted
        if not complete.exists():
            say(f"creating {self.directory.name}" + (f" over torch {torch}" if torch else ""))
            venv.create(
                self.directory, clear=True, with_pip=True, system_site_packages=torch is not None
            )
            complete.touch()
        stamp = self.directory / f"installed-{extra}"
        state = fingerprint(torch)
        if stamp.exists() and stamp.read_text() == state:
            return
        if torch is None:
            say(f"installing {TORCH}")
            self.pip(TORCH)
        constraint = self.directory / "constraints.txt"
        constraint.write_text(f"torch=={torch}\n" if torch else f"{TORCH}\n")
        self.pip(*BUILD_TOOLS)
        say("building and installing heteroakd_fast")
        self.run("-c", "import setup; setup.announce()")  # pip does not show it
        self.pip(
            "--no-build-isolation", "--constraint", str(constraint), "--editable", f".[{extra}]"
        )
        stamp.write_text(state)

    def prepare_zoo(self) -> None:
        """Libraries that would replace torch, or break others, if they were installed beside it:
        in a folder of their own, for the one test that puts it on its path."""
        wanted = ROOT / "tests" / "integrations" / "zoo.txt"
        stamp = self.directory / "installed-zoo"
        if stamp.exists() and stamp.read_text() == wanted.read_text():
            return
        zoo = self.directory / "zoo"
        shutil.rmtree(zoo, ignore_errors=True)
        say("fetching the libraries that the integration tests train with")
        self.pip("--no-deps", "--target", str(zoo), "--requirement", str(wanted))
        stamp.write_text(wanted.read_text())


def fingerprint(torch: str | None) -> str:
    """Changes whenever something that is built or installed changes."""
    digest = hashlib.sha256(repr((torch, sys.version)).encode())
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").rglob("*.*"))]
    for file in files:
        digest.update(file.read_bytes())
    names = ("CXX", "CXXFLAGS", "CUDA_HOME", "NVCC_FLAGS", "TORCH_CUDA_ARCH_LIST")
    for name, value in sorted(os.environ.items()):
        if name in names or name.startswith("HETEROAKD_BUILD"):
            digest.update(f"{name}={value}".encode())
    return digest.hexdigest()


def settle_cuda(job: str) -> None:
    """What of the CUDA part is built, unless the environment says so: for the GPUs that are here.
    Without one nothing of it could run: it is left out, or for the tests built for one
    architecture, whatever torch is for, because it must compile without a warning and link."""
    if os.environ.get("HETEROAKD_BUILD_CUDA"):
        return
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    capabilities = [
        one for one in compute_capabilities() if float(one) >= 8.0
    ]  # the kernels' least
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        if capabilities:
            # A GPU that is newer than nvcc runs PTX of the default architectures.
            known = output_of(nvcc, "--list-gpu-arch").split()
            if all("compute_" + one.replace(".", "") in known for one in capabilities):
                os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(
                    "9.0a" if one == "9.0" else one for one in capabilities
                )
        elif job == "test":
            os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0a"
            # Slow code, soon compiled: the tests that read machine code compile their own.
            quick = " -Ofc=max" if "-Ofc" in output_of(nvcc, "--help") else ""
            os.environ.setdefault("NVCC_FLAGS", "-Werror all-warnings" + quick)
        else:
            os.environ["HETEROAKD_BUILD_CUDA"] = "0"
    if job == "test" and output_of(nvcc, "--version"):
        os.environ["HETEROAKD_BUILD_CUDA"] = "1"


def compute_capabilities() -> list[str]:
    """Of the NVIDIA GPUs of this machine, such as 9.0."""
    found = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    lines = {line.strip() for line in found.splitlines()}
    return sorted(line for line in lines if line.replace(".", "").isdigit())


def output_of(*command: str) -> str:
    """Nothing where the program is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


def main(arguments: list[str]) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this file runs before anything is checked)
        raise SystemExit("dev.py: needs Python 3.10 or newer")
    if not arguments or arguments[0] not in ("demo", "experiment", "bench", "test", "gpu"):
        print(__doc__)
        raise SystemExit(0 if arguments in (["-h"], ["--help"]) else 2)
    job, rest = arguments[0], arguments[1:]
    if job == "gpu":
        if find_torch() is None and not {"--dry-run", "-h", "--help"} & set(rest):
            say(
                f"gpu: {sys.executable} has no torch >= 2.10; call dev.py with the interpreter "
                "that has one for CUDA (this job makes no environment of its own)"
            )
            raise SystemExit(2)
        sys.path.insert(0, str(ROOT))  # it is there already, unless Python was told otherwise
        from benchmarks import gpu

        raise SystemExit(gpu.main(rest))
    settle_cuda(job)
    environment = Environment(ROOT / ".venv")
    if job in ("demo", "experiment"):
        environment.prepare("train")
        module = "heteroakd_fast.train" + (".experiment" if job == "experiment" else "")
        environment.run("-m", module, *rest)
        return
    if job == "bench":
        environment.prepare("bench")
        environment.run("-m", "benchmarks", *rest)
        return
    environment.prepare("test")
    # Several workers: kernels that are interpreted, not compiled, take one core each.
    workers = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal", "--durations", "30")
    with ThreadPoolExecutor(2) as beside:  # one waits for a network, one takes one core
        zoo = beside.submit(environment.prepare_zoo)
        if rest:
            zoo.result()
            environment.run("-m", "pytest", *rest)
            return
        environment.run("-m", "ruff", "check", ".")
        environment.run("-m", "ruff", "format", "--check", ".")
        types = beside.submit(environment.output, "-m", "mypy")
        try:
            zoo.result()
            environment.run("-m", "pytest", *workers)
        finally:  # not in the middle of the tests' output
            found = types.result()
            print(found.stdout, end="", flush=True)
        if found.returncode != 0:
            raise SystemExit(1)
    environment.run("-m", "benchmarks", "gate")
    # Benchmark reports say whether the tests passed on the sources they ran on.
    environment.run("-m", "benchmarks.provenance", "--tests-passed")


if __name__ == "__main__":
    main(sys.argv[1:])
