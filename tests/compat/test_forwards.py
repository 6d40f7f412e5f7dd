"""Forwards, and the CUDA graphs that hold them."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compat.syntax import calls, tree

pytestmark = pytest.mark.compat


def test_graphs_are_captured_and_replayed_through_torchs_class() -> None:
    """All of vLLM's Python: what `compat.worker.cuda_graphs` wraps is all there is; a miss is named."""
    import vllm

    root = Path(vllm.__file__).parent
    sources = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
    found = {
        path.relative_to(root).as_posix(): graph_uses(text)
        for path, text in sources.items()
        if re.search(r"CUDAGraph|(cu|cuda|hip)Graph|graphed", text)
    }
    made = [place for place, uses in found.items() if "torch.cuda.CUDAGraph()" in uses]
    assert {"compilation/cuda_graph.py", "v1/worker/gpu/cudagraph_utils.py"} <= set(made), made
    allowed = {"torch.cuda.CUDAGraph()"}
    others = {place: uses - allowed for place, uses in found.items() if uses - allowed}
    # On XPUs vLLM replaces torch's class; there is no DWDP there.
    assert others == {"v1/worker/xpu_model_runner.py": {"torch.cuda.CUDAGraph = ..."}}, others


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("g = torch.cuda.CUDAGraph()", {"torch.cuda.CUDAGraph()"}),
        ("g = CUDAGraph()", {"CUDAGraph()"}),
        ("g = torch._C._CUDAGraph(keep_graph=True)", {"torch._C._CUDAGraph"}),
        ("from torch._C import _CUDAGraph as G", {"_CUDAGraph"}),
        ("from torch.cuda.graphs import CUDAGraph", {"CUDAGraph"}),
        ("class G(torch.cuda.CUDAGraph): ...", {"class G(torch.cuda.CUDAGraph)"}),
        ("make = torch.cuda.CUDAGraph", {"torch.cuda.CUDAGraph"}),
        ("torch.cuda.CUDAGraph.replay(g)", {"torch.cuda.CUDAGraph.replay"}),
        ("lib.cudaGraphLaunch(g, s)", {"lib.cudaGraphLaunch"}),
        ("getattr(lib, 'cuGraphLaunch')(g, s)", {"'cuGraphLaunch'"}),
        ("f = torch.cuda.make_graphed_callables(f, x)", {"torch.cuda.make_graphed_callables"}),
        ("graph: torch.cuda.CUDAGraph | None = None", set()),
        (
            "def f(g: dict[int, torch.cuda.CUDAGraph]) -> None: 'a CUDAGraph is cuGraphLaunched'",
            set(),
        ),
    ],
)
def test_a_way_around_torchs_graphs_is_seen(text: str, uses: set[str]) -> None:
    assert graph_uses(text) == uses


def graph_uses(text: str) -> set[str]:
    """Every way in which a source touches graph classes or the driver's graph calls, but types."""
    visitor = GraphUses()
    visitor.visit(ast.parse(text))
    return visitor.uses


class GraphUses(ast.NodeVisitor):
    """Collects them; annotations are skipped."""

    def __init__(self) -> None:
        self.uses: set[str] = set()

    def generic_visit(self, node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for each in value if isinstance(value, list) else [value]:
                    if isinstance(each, ast.AST):
                        self.visit(each)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        graphs = [ast.unparse(base) for base in node.bases if is_graph(ast.unparse(base))]
        self.uses |= {f"class {node.name}({base})" for base in graphs}
        node.bases = [base for base in node.bases if not is_graph(ast.unparse(base))]
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        targets = [ast.unparse(target) for target in node.targets]
        self.uses |= {f"{target} = ..." for target in targets if is_graph(target)}
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if re.fullmatch(r"(torch\.cuda\.)?CUDAGraph", name):
            self.uses.add(f"{name}()")
            node.func = ast.Name("made")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_graph(ast.unparse(node)):
            self.uses.add(ast.unparse(node))
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.uses |= {node.id} if is_graph(node.id) else set()

    def visit_alias(self, node: ast.alias) -> None:
        self.uses |= {node.name} if is_graph(node.name) else set()

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and is_graph(node.value):
            self.uses.add(repr(node.value))


def is_graph(name: str) -> bool:
    """Whether a dotted name is torch's graph class, a member of it, or a call that makes graphs."""
    members = r"_?CUDAGraph(\.\w+)?|(cu|cuda|hip)Graph[A-Z]\w*|make_graphed_callables"
    return bool(re.fullmatch(rf"([\w.]+\.)?({members})", name))


def test_on_gpus_the_layer_is_called_inside_an_opaque_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There wait and record run eagerly, also during capture, and are never traced."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    gpu = SimpleNamespace(is_tpu=lambda: False, is_cpu=lambda: False)
    monkeypatch.setattr(moe_runner, "current_platform", gpu)
    for shared, operator in ((None, "moe_forward"), (object(), "moe_forward_shared")):
        runner: Any = SimpleNamespace(_shared_experts=shared)
        chosen = moe_runner.MoERunner._select_forward(runner)
        assert chosen is getattr(torch.ops.vllm, operator)
    assert "self.routed_experts.forward_modular" in calls(moe_runner.MoERunner)


def test_breakable_graphs_are_segments_of_torchs_class() -> None:
    """The default of DeepSeek V3.2 and V4. Segments keep bound replays, made behind our wrap."""
    from vllm.compilation.breakable_cudagraph import (
        BreakableCUDAGraphCapture,
        BreakableCUDAGraphWrapper,
    )
    from vllm.config.vllm import DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES
    from vllm.v1.worker import gpu_model_runner

    expected = {"DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM"}
    assert expected <= DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES
    begin = calls(BreakableCUDAGraphCapture._begin_segment)
    assert {"torch.cuda.CUDAGraph", "g.capture_begin"} <= set(begin)
    end = ast.unparse(tree(BreakableCUDAGraphCapture._end_segment))
    assert end.index("self._current_graph.capture_end()") < end.index(
        "self.segments.append(self._current_graph.replay)"
    )
    assert "self.runnable" in calls(BreakableCUDAGraphWrapper._capture), "inside, with its hooks"
    assert "entry.capture.replay" in calls(BreakableCUDAGraphWrapper._replay)
    # Our hooks are on the module itself.
    assert "self.model.unwrap" in calls(gpu_model_runner.GPUModelRunner.get_model)


def test_a_forward_knows_how_many_tokens_it_computes() -> None:
    """Both runners say it of every forward that is not captured whole."""
    from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context

    from vllm_dwdp.compat.worker.forward import num_tokens_of_forward

    assert num_tokens_of_forward() is None
    facts: dict[str, Any] = {"no_compile_layers": {}, "attn_metadata": {}, "slot_mapping": {}}
    with override_forward_context(ForwardContext(**facts)):
        assert num_tokens_of_forward() is None
    descriptor = BatchDescriptor(num_tokens=24)
    with override_forward_context(ForwardContext(**facts, batch_descriptor=descriptor)):
        assert num_tokens_of_forward() == 24
