"""The newest vLLM of the range, as an environment beside the one of the tests.

There is no CPU build of it. Its Python comes from the wheel that is made for GPUs; the compiled
parts are those of the CPU build of the environment that this runs in, whose other packages serve as
well. The kernel of quantised experts, whose signature has changed between the two, is called as it was
compiled (`cpu_gates.as_compiled`).

    python -m tests.helpers.other_vllm

makes it, which takes half a minute and 336 MB from PyPI, and prints its Python.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from tests.helpers.environments import make_venv

ROOT = Path(__file__).parents[2]
VERSION = "0.33.0"
FOLDER = ROOT / ".venv-0.33"
PLATFORM = "manylinux_2_28_x86_64"
LEFT_OUT = (".so", ".h", ".hpp", ".cuh", ".inl", ".cu", ".cpp", "/vllm-rs", "/RECORD")
"""Ends of names of what runs on a GPU, or not at all without the rest."""
PROGRAMS = {
    "vllm": "vllm.entrypoints.cli.main",
    "vllm-dwdp": "vllm_dwdp.entrypoints.cli.main",
}
BESIDE = ("vllm-router",)
"""Programs of other packages, which do not depend on vLLM."""
PROGRAM = """#!{python}
import sys
from {module} import main
if __name__ == "__main__":
    sys.exit(main())
"""


def main() -> None:
    done = FOLDER / f"made-{VERSION}"
    if not done.exists() or done.stat().st_mtime < Path(__file__).stat().st_mtime:
        make()
        done.touch()
    print(FOLDER / "bin" / "python")


def make() -> None:
    """Make the environment anew."""
    site_packages = make_venv(FOLDER)
    # A checkout installed in the first environment is not one of that folder's packages.
    (site_packages / "checkout.pth").write_text(f"{ROOT}\n")
    with tempfile.TemporaryDirectory() as download:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        command += [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--platform",
            PLATFORM,
            "--dest",
            download,
        ]
        subprocess.run([*command, f"vllm=={VERSION}"], check=True, stdout=sys.stderr)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            wanted = [name for name in packed.namelist() if not name.endswith(LEFT_OUT)]
            packed.extractall(site_packages, wanted)
    name_it_a_cpu_build(site_packages)
    link_compiled_parts(site_packages)
    for program, module in PROGRAMS.items():
        path = FOLDER / "bin" / program
        path.write_text(PROGRAM.format(python=FOLDER / "bin" / "python", module=module))
        path.chmod(0o755)
    for program in BESIDE:
        if (found := Path(sys.executable).with_name(program)).exists():
            (FOLDER / "bin" / program).symlink_to(found)


def name_it_a_cpu_build(site_packages: Path) -> None:
    """Rename the distribution, by whose version vLLM chooses its platform."""
    metadata = site_packages / f"vllm-{VERSION}.dist-info"
    named = metadata.rename(site_packages / f"vllm-{VERSION}+cpu.dist-info") / "METADATA"
    stock, ours = f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n"
    text = named.read_text()
    assert text.count(stock) == 1, "the wheel says its version in another way"
    named.write_text(text.replace(stock, ours))


def link_compiled_parts(site_packages: Path) -> None:
    """Link the shared libraries of the CPU build into the new package."""
    source = Path(sysconfig.get_path("purelib")) / "vllm"
    libraries = sorted(source.rglob("*.so"))
    assert libraries, f"{distribution('vllm').version} has no compiled part in {source}"
    for library in libraries:
        place = site_packages / "vllm" / library.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(library.resolve())


if __name__ == "__main__":
    main()
