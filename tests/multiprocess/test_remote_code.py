"""Processes that start together with `trust_remote_code` and an empty cache of modules."""

import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_dwdp.compat.worker import remote_code
from vllm_dwdp.errors import DwdpConfigError

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]

FORK = multiprocessing.get_context("fork")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from transformers import PretrainedConfig
from .parts import value

class OurConfig(PretrainedConfig):
    model_type = "ours"
    value = value
"""
PARTS = "import json\n\nvalue = 7\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what a download leaves of a checkpoint whose configuration is code, in two files."""
    folder = tmp_path_factory.mktemp("hub")
    snapshot = folder / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "models--org--name" / "refs").mkdir()
    (folder / "models--org--name" / "refs" / "main").write_text(COMMIT)
    config = {"model_type": "ours", "auto_map": {"AutoConfig": "configuration.OurConfig"}}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "configuration.py").write_text(CODE)
    (snapshot / "parts.py").write_text(PARTS)
    return folder


class Pair:
    """Two processes that read a checkpoint: the second one begins when the first has half of a file."""

    def __init__(self, hub: Path, cache: Path, *, is_locked: bool, model: str = "org/name") -> None:
        self.hub, self.cache, self.is_locked, self.model = hub, cache, is_locked, model
        self.has_half, self.goes_on = FORK.Event(), FORK.Event()

    def run(self) -> list[int | None]:
        """Return the exit codes."""
        first = FORK.Process(target=self._read, args=(True,))
        second = FORK.Process(target=self._read, args=(False,))
        first.start()
        assert self.has_half.wait(60)
        second.start()
        second.join(1 if self.is_locked else 60)
        self.goes_on.set()
        for process in (first, second):
            process.join(60)
        return [first.exitcode, second.exitcode]

    def _read(self, is_slow: bool) -> None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
        from transformers import AutoConfig, dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = str(self.cache)
        if is_slow:
            shutil.copyfile = self._copy_slowly  # type: ignore[assignment]
        if self.is_locked:
            remote_code.install()
        config = AutoConfig.from_pretrained(
            self.model, trust_remote_code=True, cache_dir=self.hub, local_files_only=True
        )
        assert config.value == 7

    def _copy_slowly(self, source: Path, target: Path) -> None:
        content = Path(source).read_bytes()
        with Path(target).open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            self.has_half.set()
            self.goes_on.wait(60)
            file.write(content[len(content) // 2 :])


@pytest.fixture(autouse=True)
def imported() -> Iterator[None]:
    """Import transformers once, for all that are forked; what is installed there stays there."""
    from transformers import AutoConfig, dynamic_module_utils

    assert AutoConfig
    stock = dynamic_module_utils.get_cached_module_file
    yield
    dynamic_module_utils.get_cached_module_file = stock


def test_stock_reads_what_another_process_has_half_written(hub: Path, tmp_path: Path) -> None:
    """Else `remote_code` can go."""
    assert Pair(hub, tmp_path / "modules", is_locked=False).run() == [0, 1]


@pytest.mark.parametrize("is_local", [False, True])
def test_nobody_reads_half_of_a_file(hub: Path, tmp_path: Path, is_local: bool) -> None:
    snapshot = hub / "models--org--name" / "snapshots" / COMMIT
    model = str(snapshot) if is_local else "org/name"
    pair = Pair(hub, tmp_path / "modules", is_locked=True, model=model)
    assert pair.run() == [0, 0]


def hold(folder: Path, has: Any, ends: Any) -> None:
    with remote_code.locked(folder), remote_code.locked(folder):
        has.set()
        ends.wait(60)


def test_a_lock_that_is_held_for_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has, ends = FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path, has, ends))
    holder.start()
    assert has.wait(60)
    monkeypatch.setattr(remote_code, "WAIT_S", 0.2)
    lock = re.escape(str(tmp_path / ".dwdp-lock"))
    message = f"another process holds {lock} for 0.2 s .*fuser.* End it, or set HF_MODULES_CACHE"
    with pytest.raises(DwdpConfigError, match=message), remote_code.locked(tmp_path):
        pass
    holder.kill()  # the kernel drops its lock
    holder.join(60)
    with remote_code.locked(tmp_path):
        pass


def test_a_cache_that_cannot_be_written_is_read_without_a_lock(hub: Path, tmp_path: Path) -> None:
    """As one that is part of a container's image; here a file stands where the lock would."""
    (tmp_path / ".dwdp-lock").mkdir()
    with remote_code.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".dwdp-lock"]


def test_it_is_installed_once() -> None:
    from transformers import dynamic_module_utils

    stock = dynamic_module_utils.get_cached_module_file
    remote_code.install()
    installed = dynamic_module_utils.get_cached_module_file
    remote_code.install()
    assert dynamic_module_utils.get_cached_module_file is installed is not stock
