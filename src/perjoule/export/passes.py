"""What the exporter would do to its graph, but for two things that hang on the values of parameters.

Constants are folded, patterns rewritten, equal constants and equal nodes merged, as onnxscript does for
torch.onnx.export(optimize=True). That also merges equal parameters of up to 1,024 elements, and drops biases that are
zero: those of a fresh network, or those that folding its batch norms made. A compressed version has other values there,
and would weigh more than was promised from the original's graph. So parameters stay apart, and zero biases stay.
"""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, RewritePass
from onnxscript.rewriter.rules.common import (
    remove_optional_bias_from_conv_rule,
    remove_optional_bias_from_conv_transpose_rule,
    remove_optional_bias_from_gemm_rule,
)

ROUNDS = 2
"""Folding opens patterns, rewriting opens constants; as often as the exporter itself does it."""
DROP_ZEROS = (
    remove_optional_bias_from_conv_rule,
    remove_optional_bias_from_conv_transpose_rule,
    remove_optional_bias_from_gemm_rule,
)
RULES = [rule for rule in _DEFAULT_REWRITE_RULES if rule not in DROP_ZEROS]
SMALL = 1024
"""Elements of a constant that is looked at for equals."""


def optimized(model: ir.Model, root: str) -> ir.Model:
    """`model` simplified in place. Names of parameters, and of what was folded into them, begin with `root`."""
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        _drop_made_zeros(model.graph, root)
        RewritePass(RULES)(model)
        common.RemoveUnusedNodesPass()(model)
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    ):
        step(model)
    _merge(model.graph, root)
    for last in (common.CommonSubexpressionEliminationPass(), common.OutputFixPass(), common.NameFixPass()):
        last(model)
    return model


def _drop_made_zeros(graph: ir.Graph, root: str) -> None:
    """A convolution without bias is traced with zeros for one; without them a folded norm is named after the weight."""
    for node in graph:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias = ir.convenience.get_const_tensor(node.inputs[2])
        if bias is not None and not str(node.inputs[2].name).startswith(f"{root}.") and not bias.numpy().any():
            node.resize_inputs(2)


def _merge(graph: ir.Graph, root: str) -> None:
    """One constant for all that are equal in type, shape and content."""
    known: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        constant = value.const_value
        if name.startswith(f"{root}.") or constant is None or constant.size > SMALL or constant.dtype.is_string():
            continue
        if value.is_graph_input() or value.is_graph_output():
            continue
        key = (constant.dtype, cast(tuple[int, ...], tuple(constant.shape)), constant.tobytes())
        first = known.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(name)
