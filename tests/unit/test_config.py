"""What the user may say, and how a refusal reads."""

from typing import Any

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpConfigError


def test_defaults_share_one_copy_among_all_ranks() -> None:
    config = DwdpConfig.from_options({}, data_parallel_size=4)
    assert config.mode == "auto"
    assert config.group_size == 4
    assert config.experts_per_rank is None
    assert config.slice_bytes is None, "the device's"
    assert config.join_timeout_s == 600
    assert config.executor is None
    assert config.shares_experts


@pytest.mark.parametrize(
    ("options", "size"), [({"mode": "replica"}, 4), ({"group_size": 1}, 4), ({}, 1)]
)
def test_some_settings_share_nothing(options: dict[str, Any], size: int) -> None:
    assert not DwdpConfig.from_options(options, size).shares_experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moed": "direct"}, r"'moed' is unknown. Did you mean 'mode'\? Known options: mode, "),
        ({"mode": "fast"}, "mode='fast' is unknown; choose one of auto, direct, prefetch, replica"),
        ({"executor": "ray"}, "executor='ray' is unknown; choose one of uni, mp"),
        ({"group_size": 3}, r"group_size=3 does not divide --data-parallel-size 4; .*\[1, 2, 4\]"),
        ({"group_size": 0}, "group_size=0 must be an integer of at least 1"),
        ({"group_size": True}, "group_size=True must be an integer"),
        ({"experts_per_rank": 0}, "experts_per_rank=0 must be an integer of at least 1"),
        (
            {"slice_bytes": 100},
            "slice_bytes=100 must be an integer of at least 4096, or 0, which cuts nothing",
        ),
        ({"slice_bytes": False}, "slice_bytes=False must be an integer of at least 4096"),
        ({"direct_max_tokens": -1}, "direct_max_tokens=-1 must be an integer of at least 0"),
        ({"join_timeout_s": 0}, "join_timeout_s=0 must be a positive number of seconds"),
        ({"rendezvous": 7}, "rendezvous=7 must be a string"),
        (
            {"rendezvous": "unix:///x", "rendezvous_secret_file": "/s"},
            "rendezvous_secret_file='/s' is used by tcp:// only, and rendezvous is 'unix:///x'",
        ),
        ([], r"additional_config\['dwdp'\] is \[\]; it must be a JSON object"),
    ],
)
def test_refusals_name_setting_value_and_fix(options: Any, message: str) -> None:
    with pytest.raises(DwdpConfigError, match=message):
        DwdpConfig.from_options(options, data_parallel_size=4)


def test_no_config_is_made_unchecked() -> None:
    """Also not by those who know the field names: processes of ranks rely on what the front end saw."""
    with pytest.raises(DwdpConfigError, match="mode='fast' is unknown"):
        DwdpConfig(mode="fast", group_size=2)
    with pytest.raises(DwdpConfigError, match="group_size=0 must be"):
        DwdpConfig(group_size=0)
