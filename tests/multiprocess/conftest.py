"""What tests of ranks that meet share."""

import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from tests.helpers.files import num_open_files
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.meeting import make_abstract_endpoint, parse_endpoint


@pytest.fixture(params=["abstract", "unix"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    if request.param == "abstract":
        return make_abstract_endpoint()
    return parse_endpoint(f"unix://{tmp_path}/meet")


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    resource_tracker.ensure_running()  # multiprocessing's own descriptor, opened once
    before = num_open_files(), threading.active_count()
    yield
    assert (num_open_files(), threading.active_count()) == before
