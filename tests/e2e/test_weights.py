"""New weights for ranks that serve: all ranks answer as stock vLLM with the new checkpoint, or refuse.

Stock vLLM 0.32 itself reloads experts wrongly on a CPU, so what is compared with is a stock engine that
was started with the new checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from gpu_checks.fake import fake_cuda_environment
from gpu_checks.quantised import make_quantised_checkpoint
from tests.e2e import test_simulated_cuda as simulated
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.matrix import run_cases
from tests.helpers import cpu_gates
from tests.helpers.engines import fork
from tests.helpers.weight_files import parts_of

pytestmark = [pytest.mark.e2e, pytest.mark.every_version, pytest.mark.timeout(600)]

GATES = {"prepare": "tests.helpers.cpu_gates:open_gates"}
TRANSFER = {
    "prepare": "tests.helpers.weight_files:register",
    "engine_args": {"weight_transfer_config": {"backend": "files"}},
}
CHECKED = {"report": "tests.helpers.weight_files:checksums"}
AGREE = "vllm_dwdp.distributed.weight_agreement:WeightAgreement.agree"
WRITE = "vllm_dwdp.model_executor.incoming:ModelUpdate.finish"


@pytest.fixture(scope="module")
def old(checkpoints: Checkpoints) -> str:
    return checkpoints("qwen3_moe", 7)


@pytest.fixture(scope="module")
def new(checkpoints: Checkpoints) -> str:
    return checkpoints("qwen3_moe", 7, seed=1)


@pytest.fixture(scope="module")
def tokens(old: str, new: str, stock: StockEngine) -> dict[str, list[list[int]]]:
    """Return what stock vLLM answers, by checkpoint."""
    return {model: result["tokens"] for model, result in stock.all([old, new]).items()}


def reload(path: str) -> dict[str, Any]:
    return {"calls": [["reload_weights", {"weights_path": path}]]}


def case(name: str, model: str, *updates: dict[str, Any], **more: Any) -> dict[str, Any]:
    dwdp = {"mode": name.partition("-")[0], "join_timeout_s": more.pop("join_timeout_s", 60)}
    return {
        "name": name,
        "model": model,
        "num_ranks": 2,
        "dwdp": dwdp,
        "updates": list(updates),
    } | more


def transfer(model: str) -> dict[str, Any]:
    """Return what a trainer calls: the weights in two chunks."""
    infos = [{"folder": model, "parts": parts} for parts in parts_of(model)]
    chunks = [["update_weights", {"update_info": info}] for info in infos]
    return {"calls": [["start_weight_update", {}], *chunks, ["finish_weight_update", {}]]}


@pytest.mark.feature("reload_weights")
@pytest.mark.feature("weight transfer (start, update, finish)")
def test_all_ranks_serve_the_new_weights(
    old: str, new: str, tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    cases = [
        case("direct", old, reload(new), reload(old), **CHECKED),
        case("prefetch", old, reload(new), {"calls": [["reload_weights", {}]]}),
        case("prefetch-sent", old, transfer(new), reload(old), **TRANSFER, **CHECKED),
    ]
    wanted = {"direct": (new, old), "prefetch": (new, new), "prefetch-sent": (new, old)}
    found = run_cases(tmp_path, "reloaded", cases)
    checked = [rank["checksums"] for name in ("direct", "prefetch-sent") for rank in found[name]]
    assert all(each == checked[0] for each in checked), "/weight_checker reads what slots hold"
    for name, ranks in found.items():
        for rank in ranks:
            assert rank["tokens"] == tokens[old]
            for number, (said, model) in enumerate(
                zip(rank["updates"], wanted[name], strict=True), 1
            ):
                where = (name, rank["rank"], number, said["error"], said["refused"])
                assert (said["error"], said["resume"]) == ("", ""), where
                assert said["tokens"] == tokens[model], where
                assert said["status"]["weight_update"] == number, where
                assert said["status"]["state"] == "serving", where
        assert ranks[0]["weights"] == ranks[1]["weights"]
        assert len({rank["updates"][0]["status"]["weights"]["digest"] for rank in ranks}) == 1
        first, last = (said["status"]["weights"] for said in ranks[0]["updates"])
        assert first["digest"].startswith("update ") == (name == "prefetch-sent")
        assert first["checkpoint"] == (None if name == "prefetch-sent" else new)
        assert (first == last) == (name == "prefetch")


@pytest.mark.feature("Worker processes (`executor` `mp`)")
def test_worker_processes_serve_the_new_weights(
    old: str, new: str, tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    mp = case("prefetch", old, reload(new), transfer(old), **TRANSFER)
    mp["dwdp"]["executor"] = "mp"
    for rank in run_cases(tmp_path, "mp", [mp])["prefetch"]:
        (worker,) = rank["workers"]
        assert worker["status"]["fetched_bytes"], "its experts are shared"
        assert rank["tokens"] == tokens[old]
        for number, (said, model) in enumerate(zip(rank["updates"], (new, old), strict=True), 1):
            assert (said["error"], said["refused"]) == ("", ""), said
            assert said["tokens"] == tokens[model], number
            assert said["status"]["weight_update"] == number


@pytest.mark.skipif(cpu_gates.why_not() is not None, reason=str(cpu_gates.why_not()))
@pytest.mark.parametrize(
    "formats",
    [
        pytest.param(("fp8_block", "gpt_oss_mxfp4"), id="two-formats"),
        pytest.param(
            ("bf16_fused", "ct_int8", "ct_int4", "gptq", "awq"),
            id="other-formats",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_quantised_experts_are_processed_and_written_anew(
    formats: tuple[str, ...], stock: StockEngine, tmp_path: Path
) -> None:
    made = {
        (name, seed): str(
            make_quantised_checkpoint(tmp_path / f"{name}-{seed}", name, 7, seed=seed)
        )
        for name in formats
        for seed in (0, 1)
    }
    stocks = stock.all([made[name, 1] for name in formats], **GATES)
    cases = [
        GATES | case(f"{mode}-{name}", made[name, 0], reload(made[name, 1]))
        for name, mode in zip(formats, ("prefetch", "direct") * 3, strict=False)
    ]
    for name, ranks in run_cases(tmp_path, "quantised", cases).items():
        expected = stocks[made[name.partition("-")[2], 1]]
        for rank in ranks:
            said = rank["updates"][0]
            assert (said["error"], said["refused"]) == ("", ""), name
            assert said["tokens"] == expected["tokens"] != rank["tokens"], name
            assert rank["weights"] == expected["weights"], name


@pytest.mark.slow
def test_experts_in_simulated_device_memory(
    checkpoints: Checkpoints, stock: StockEngine, tmp_path: Path
) -> None:
    """Own pieces mapped once more, both views of `auto`, experts that several ranks keep."""
    made = {
        (name, seed): checkpoints(name, 7, seed=seed, **simulated.SHAPE)
        for name in ("gpt_oss", "mixtral")
        for seed in (0, 1)
    }
    stocks = stock.all([made["gpt_oss", 1], made["mixtral", 1]])
    options = {
        "gpt_oss": {"mode": "auto", "direct_max_tokens": 8},
        "mixtral": {"mode": "prefetch", "experts_per_rank": 4},
    }
    cases = [
        case(f"auto-{name}", made[name, 0], reload(made[name, 1]), num_ranks=3, dwdp=dwdp)
        | simulated.SIMULATED
        for name, dwdp in options.items()
    ]
    environment = fake_cuda_environment() | {"DWDP_DEBUG_POISON": "1"}
    for name, ranks in run_cases(tmp_path, "simulated", cases, environment).items():
        expected = stocks[made[name.removeprefix("auto-"), 1]]
        for rank in ranks:
            said = rank["updates"][0]
            assert (said["error"], said["refused"]) == ("", ""), name
            assert said["tokens"] == expected["tokens"] != rank["tokens"], name
            assert rank["weights"] == expected["weights"], name
            assert not any(rank["cuda_left"].values()), (name, rank["cuda_left"])


def test_a_rank_that_fails_leaves_the_group_refusing_until_an_update_succeeds(
    checkpoints: Checkpoints,
    old: str,
    new: str,
    tokens: dict[str, list[list[int]]],
    tmp_path: Path,
) -> None:
    fails = {"kill": WRITE, "with": "RuntimeError", "on": 1}
    alone = reload(new) | {"ranks": [0]}
    unequal = transfer(new)
    unequal["calls"][1][1]["update_info"]["folder"] = old
    by_hand = {
        "calls": [
            ["start_weight_update", {}],
            ["update_weights", {"update_info": {"folder": new, "in_place": True}}],
            ["finish_weight_update", {}],
        ]
    }
    cases = [
        case("direct-fails", old, reload(new) | fails, reload(new)),
        case(
            "prefetch-shape",
            old,
            reload("/nowhere"),
            reload(checkpoints("qwen3_moe", 7, hidden_size=64)),
        ),
        case("prefetch-in-place", old, by_hand, unequal, reload(new), **TRANSFER),
        case("direct-alone", old, alone, join_timeout_s=3),
    ]
    found = run_cases(tmp_path, "failed", cases)
    for rank in found["direct-fails"]:
        failed, repaired = rank["updates"]
        assert "injected at" in failed["error"]
        assert "the update of the weights failed on rank" in failed["refused"]
        assert (
            "Repeat the update on all ranks; if one of them has died, restart" in failed["refused"]
        )
        assert failed["resume"] == failed["refused"], "after a pause the engine stays paused"
        assert failed["status"]["state"] == "refusing"
        assert repaired["tokens"] == tokens[new], repaired
    mistyped = [rank["updates"][0]["error"] for rank in found["prefetch-shape"]]
    assert "was not begun: there is no /nowhere on this host" in str(mistyped), mistyped
    for rank in found["prefetch-shape"]:
        mistyped, misshapen = rank["updates"]
        assert "this rank goes on with the weights that it has" in mistyped["error"], mistyped
        assert mistyped["tokens"] == tokens[old] and mistyped["status"]["state"] == "serving"
        assert misshapen["status"]["state"] == "refusing"
        assert (
            "AssertionError (the tensor that came last is lm_head.weight)" in misshapen["refused"]
        )
    for rank in found["prefetch-in-place"]:
        failed, mixture, repaired = rank["updates"]
        assert "no weights came by way of the model's load_weights" in failed["error"]
        assert "refuses to serve" in failed["refused"]
        assert not mixture["error"], "the same mixture on all ranks is the trainer's business"
        assert repaired["tokens"] == tokens[new], repaired
    for rank in found["direct-alone"]:
        (said,) = rank["updates"]
        assert said["tokens"] == tokens[old], "nothing was written"
        if rank["rank"] == 0:
            assert "was not begun: rank" in said["error"], (
                "rank 1 does not come, or has ended by then"
            )
            assert "this rank goes on with the weights that it has" in said["error"]


def test_a_rank_that_dies_half_way_leaves_the_other_refusing(
    old: str, new: str, tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    killed = case("prefetch", old, reload(new) | {"kill": AGREE, "on": 1})
    (rank,) = run_cases(tmp_path, "killed", [killed], expected_codes=[0, -9])["prefetch"]
    (said,) = rank["updates"]
    assert "rank 1 of group 0 is dead" in said["error"]
    assert "if one of them has died, restart all ranks of the group" in said["refused"]
    again = run_cases(tmp_path, "again", [case("prefetch", new)])["prefetch"]
    assert [rank["tokens"] for rank in again] == [tokens[new]] * 2


def run_lives(folder: Path, when: str, old: str, new: str) -> dict[str, Any]:
    """Return what `weight_lives` found."""
    results, log = folder / "results.json", folder / "lives.log"
    process = fork(["-m", "tests.e2e.weight_lives", when, str(results), old, new], log)
    try:
        assert process.wait(timeout=380) == 0, log.read_text()[-6000:]
    finally:
        process.kill()
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def test_a_rank_that_is_killed_in_an_update_and_returns_mixes_no_weights(
    old: str, new: str, tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Nobody serves or joins until every rank has said that it is whole; after that all is new."""
    found = run_lives(tmp_path, "within", old, new)
    for point in ("writing", "written"):
        lives = found[point]
        assert lives["killed"]["code"] == -9
        for said in (lives["survivor"]["first"], lives["survivor"]["last"]):
            assert "rank 0 of group 0 is dead" in said["refused"] and not said["tokens"], point
            assert said["status"]["state"] == "refusing", point
        for name in ("with old", "with new"):
            assert "this rank refuses to serve. Repeat the update" in lives[name]["error"], lives
            assert not any(lives[name]["left"].values()), (point, name)
    lives = found["whole"]
    assert lives["killed"]["code"] == -9
    for said in (lives["survivor"]["first"], lives["survivor"]["last"]):
        assert (said["error"], said["tokens"]) == ("", tokens[new][:2]), said
    for name in ("with old", "with new"):
        assert lives[name].get("tokens") == tokens[new][:2], lives
        status = lives[name]["status"]
        assert (status["adopted"], status["state"], status["weight_update"]) == (True, "serving", 1)


def test_a_rank_that_starts_again_after_an_update_takes_the_weights_of_its_group(
    old: str, new: str, tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """With its first command line; where that checkpoint is gone it is told so."""
    found = run_lives(tmp_path, "after", old, new)
    assert found["killed"]["code"] == -9
    survivor = found["survivor"]
    weights = survivor["first"]["status"]["weights"]
    place, digest = weights["checkpoint"], weights["digest"]
    assert place.startswith("/") and place.endswith("/new"), "it was given as a relative path"
    refused = found["gone"]["error"]
    assert refused.startswith(
        "PeerMismatchError: rank 1 of group 0: the ranks do not serve the same"
    )
    assert f"(update 1), from {place}: make that checkpoint readable there" in refused, refused
    assert digest[:19] in refused
    assert survivor["first"]["tokens"] == tokens[new][:2]
    for name in ("with old", "with new"):
        back = found[name]
        assert back.get("tokens") == tokens[new][:2], back
        assert back["status"]["adopted"] and back["status"]["weight_update"] == 1, back
        assert back["status"]["read_expert_bytes"] == 0
        assert back["status"]["weights"]["digest"] == digest
        assert not any(back["left"].values())
    assert found["with old"]["status"]["weights"] == weights
    for said in (found["with new"]["second"], survivor["second"]):
        assert (said["error"], said["status"]["weight_update"]) == ("", 2), said
        assert said["tokens"] == tokens[old][:2], "memory that was adopted can be written anew"
    assert not any(survivor["left"].values())
