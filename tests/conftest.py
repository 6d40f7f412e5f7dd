"""What holds for every test process, and what a test session ends with."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.helpers.engines import end_servers
from tests.helpers.ignored_signals import hear_ignored_signals
from tests.tables.record import Recorder
from tests.tables.said import pytest_runtest_makereport, pytest_runtest_setup, said

__all__ = ["pytest_runtest_makereport", "pytest_runtest_setup", "said"]

# `make test &` in a script starts pytest with SIGINT ignored; the programs that tests start must
# not inherit that.
hear_ignored_signals()

# How long an example takes is the machine's: others run beside it.
settings.register_profile("side by side", deadline=None)
settings.load_profile("side by side")


def pytest_configure(config: pytest.Config) -> None:
    """Note how tests end, where all of them are reported to."""
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(Recorder())


@pytest.fixture(autouse=True, scope="session")
def _fork_servers_end_with_the_session() -> Iterator[None]:
    yield
    end_servers()
