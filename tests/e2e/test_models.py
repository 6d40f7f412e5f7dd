"""Every family of models answers on two ranks as one stock engine, and the planner knows its KV cache.

Most run with `make test-all` only; many checkpoints share one engine process per rank.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.compat.versions import vllm_minor
from tests.e2e import uneven_experts
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.matrix import run_cases
from tests.e2e.models import MODELS, UNTRIED
from tests.helpers import missing_kernels, torchvision
from tests.helpers.environments import Unavailable
from tests.helpers.moe_registry import architectures_with_experts
from tests.tables.said import Said
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.kv_cache import LayerCache
from vllm_dwdp.planner.model_shape import shape_of

pytestmark = [pytest.mark.e2e, pytest.mark.every_version, pytest.mark.timeout(900)]

PER_PROCESS = 6
"""Checkpoints that one engine process runs after each other."""
RACES = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "3000"}
REPORT = {"fails": True, "report": "tests.e2e.kv_layers:report"}


def rows(*, served: bool) -> list[Any]:
    """One test per model, which names its row of the table."""
    return [
        pytest.param(
            name,
            id=name,
            marks=[
                pytest.mark.model(model.served_row)
                if served
                else pytest.mark.model(model.row, stock_fails=model.stock_error),
                *([] if model.on_push else [pytest.mark.slow]),
                pytest.mark.skipif(
                    vllm_minor() < model.since, reason=f"since vLLM {_dotted(model.since)}"
                ),
            ],
        )
        for name, model in MODELS.items()
        if (model.is_served if served else model.stock_error)
    ]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@dataclass
class Outcomes:
    """Results of stock engines and of two ranks, run for several models when one is asked for."""

    folder: Path
    cache: Path
    checkpoints: Checkpoints
    stock_engine: StockEngine
    _ranks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def stock(self, name: str, *, bare: bool = False) -> dict[str, Any]:
        """Return the result of a stock engine, with the model's stand-ins or `bare` of them."""
        settings = self._settings(name)
        # What a bare one imported until it failed may be in the way of others.
        together = [name] if bare else self._together(name)
        alike = [other for other in together if self._settings(other) == settings]
        paths = [self.path(other) for other in alike]
        environment = self._environment(name, () if bare else MODELS[name].stand_ins)
        found = self.stock_engine.all(paths, environment, **settings, **REPORT)
        return found[self.path(name)]

    def ranks(self, name: str, mode: str) -> list[dict[str, Any]]:
        key = f"{name}@{mode}"
        if key not in self._ranks:
            modes = ("direct", "prefetch")
            cases = [self._case(each, mode) for each in self._together(name) for mode in modes]
            environment = self._environment(name, MODELS[name].stand_ins) | RACES
            self._ranks |= run_cases(self.folder, f"ranks-{len(self._ranks)}", cases, environment)
        return self._ranks[key]

    def _environment(self, name: str, stand_ins: tuple[str, ...]) -> dict[str, str]:
        """Return what the engines of a model need; skip the test where it cannot be had."""
        found: dict[str, str] = {}
        if MODELS[name].needs_torchvision:
            if isinstance(self._torchvision, Unavailable):
                pytest.skip(str(self._torchvision))
            found = self._torchvision
        return missing_kernels.environment(stand_ins, found) if stand_ins else found

    @cached_property
    def _torchvision(self) -> dict[str, str] | Unavailable:
        try:
            return torchvision.variables(self.cache)
        except Unavailable as reason:
            return reason

    def _together(self, name: str) -> list[str]:
        alike = [
            each
            for each, model in MODELS.items()
            if model.is_served
            and model.stand_ins == MODELS[name].stand_ins
            and model.on_push == MODELS[name].on_push
            and model.needs_torchvision == MODELS[name].needs_torchvision
        ]
        start = alike.index(name) // PER_PROCESS * PER_PROCESS
        return alike[start : start + PER_PROCESS]

    def _case(self, name: str, mode: str) -> dict[str, Any]:
        return {
            "name": f"{name}@{mode}",
            "model": self.path(name),
            "num_ranks": 2,
            "dwdp": {"mode": mode, "join_timeout_s": 60},
            "fails": True,
        } | self._settings(name)

    def _settings(self, name: str) -> dict[str, Any]:
        return {"engine_args": MODELS[name].engine_args} | MODELS[name].asked

    def path(self, name: str) -> str:
        model = MODELS[name]
        return self.checkpoints(model.checkpoint or name, model.num_experts, **model.overrides)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Checkpoints,
    stock: StockEngine,
) -> Outcomes:
    cache = Path(request.config.cache.mkdir("torchvision"))
    return Outcomes(tmp_path_factory.mktemp("models"), cache, checkpoints, stock)


@pytest.mark.parametrize("name", rows(served=True))
def test_two_ranks_answer_as_stock(outcomes: Outcomes, name: str) -> None:
    expected = outcomes.stock(name)
    assert not expected["error"], f"stock vLLM does not serve it: {expected['error']}"
    _, served = architectures_with_experts()[MODELS[name].architecture]
    assert served in expected["classes"], "the row names another model"
    assert len({token for tokens in expected["tokens"] for token in tokens}) > 5, "degenerate"
    for mode in ("direct", "prefetch"):
        ranks = outcomes.ranks(name, mode)
        assert len(ranks) == 2
        for found in ranks:
            where = f"{name}, {mode}, rank {found['rank']}"
            assert not found["error"], f"{where}: {found['error']}"
            assert found["weights"] == expected["weights"], f"{where}: other weights"
            assert found["tokens"] == expected["tokens"], f"{where}: other tokens"
            status = found["status"]
            assert status["mode"] == mode
            assert status["remote_expert_bytes"] > 0, f"{where}: DWDP did not run"
            if mode == "prefetch":
                fetched = sum(status["fetched_bytes"].values())
                assert fetched > 0.9 * status["remote_expert_bytes"]


@pytest.mark.parametrize("name", rows(served=False))
def test_stock_does_not_serve_it_on_cpus(outcomes: Outcomes, name: str, said: Said) -> None:
    """When this fails, stock vLLM has learned it: take `stock_error` away."""
    said(outcomes.stock(name, bare=True)["error"] or "stock vLLM serves it")


@pytest.mark.parametrize("name", rows(served=True))
def test_the_planner_counts_the_kv_cache_as_vllm_does(outcomes: Outcomes, name: str) -> None:
    expected = outcomes.stock(name)["kv_layers"].values()
    cache = shape_of(read_config(Path(outcomes.path(name)))).kv_cache
    added = MODELS[name].window_added
    planned = (each for layer in cache.layers for each in described(layer, cache.kv_bits, added))
    assert kept(planned) == kept(expected)


def described(layer: LayerCache, kv_bits: float, window_added: int) -> Iterator[dict[str, float]]:
    """Yield what a layer of the planner keeps, in the words of `kv_layers.describe`."""
    if layer.state.num_bytes:
        yield {"convolution": layer.state.convolution, "recurrent": layer.state.recurrent}
        return
    yield {"ring_bytes": layer.ring_bytes}
    window = layer.window + window_added if layer.window else 0
    yield {"token_bytes": layer.token_bytes(kv_bits), "window": window}


def kept(layers: Iterable[dict[str, float]]) -> dict[str, Any]:
    """Return what layers keep together: bytes per token by window (0: of every token), and states.

    Rings are of a few tokens, per sequence.
    """
    per_token: dict[float, float] = {}
    states = []
    rings = 0.0
    for layer in layers:
        if "ring_bytes" in layer:
            rings += layer["ring_bytes"]
        elif "recurrent" in layer:
            states.append((layer["convolution"], layer["recurrent"]))
        elif layer["token_bytes"]:
            window = layer["window"]
            per_token[window] = per_token.get(window, 0) + layer["token_bytes"]
    return {"bytes per token by window": per_token, "states": sorted(states), "rings": rings}


@pytest.mark.slow
@pytest.mark.model("Odd shape: layers with different numbers of experts")
def test_layers_with_different_numbers_of_experts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = uneven_experts.take_experts_away(Path(checkpoints("qwen3_moe")), tmp_path / "uneven")
    case = {"model": model} | uneven_experts.REPLACE
    ((expected,),) = run_cases(tmp_path, "stock", [case | {"name": "stock"}]).values()
    cases = [
        case | {"name": mode, "num_ranks": 2, "dwdp": {"mode": mode}}
        for mode in ("direct", "prefetch")
    ]
    for mode, ranks in run_cases(tmp_path, "ranks", cases, RACES).items():
        for found in ranks:
            assert found["weights"] == expected["weights"], mode
            assert found["tokens"] == expected["tokens"], mode
            assert found["status"]["remote_expert_bytes"] > 0


@pytest.mark.slow
@pytest.mark.model(
    "Odd shape: a family whose config leaves no layer with experts",
    refused="has built no layer with routed experts, though its config counts experts, so there is "
    "nothing to share: leave --distributed-executor-backend dwdp out.",
)
def test_no_layer_with_experts_is_seen_when_the_model_is_built(
    checkpoints: Checkpoints, tmp_path: Path, said: Said
) -> None:
    """Where the front end does not know a family's rule, the rank says it before anything is shared."""
    model = checkpoints("ernie4_5_moe", moe_layer_start_index=5)
    case = {"name": "none", "model": model, "num_ranks": 2, "dwdp": {}, "fails": True}
    (ranks,) = run_cases(tmp_path, "none", [case]).values()
    for found in ranks:
        said(found["error"])


def test_every_architecture_with_experts_is_in_the_table() -> None:
    found = architectures_with_experts()
    assert len(found) > 90, "the search finds them"
    tried = {model.architecture for model in MODELS.values()}
    classes = {found.get(each) for each in tried}
    unknown = {
        each
        for each, cls in found.items()
        if each not in tried | set(UNTRIED) and cls not in classes
    }
    assert not unknown, "new in this vLLM: give each a checkpoint, or say why it has none"
    assert not tried & set(UNTRIED), "they are tried"
