"""What a job needs before any machine is chosen: FLOPs, and the shapes that the time of a layer hangs on.

    forward FLOPs per token    2*N_mm + 2*L*w_s*S          (w_s = 2*H*e: query times key, weight times value)
    training FLOPs per token   3 x forward                 PaLM (arXiv 2204.02311, appendix B): 6*N + 12*L*H*e*S
    rule of thumb              6*N*D                       Kaplan et al. 2020 (arXiv 2001.08361, §2.1)

Attention is not halved for causality, as published utilisations are not. N_mm counts the weights a token is
multiplied with: the output head is in, the input embedding is out, of a mixture only the active experts.
"""

from __future__ import annotations

from perjoule.plan.architecture import Architecture
from perjoule.plan.job import POLICIES, Training
from perjoule.plan.sheet import Sheet


def shapes(sheet: Sheet, model: Architecture, context: int) -> None:
    """The model's numbers."""
    given = sheet.given
    given("N", model.params, "1", "parameters, tied ones once", model.name)
    if model.experts:
        given("N_act", model.active_params, "1", "parameters that one token meets", model.name)
    given("N_mm", model.matmul_params, "1", "weights that one token is multiplied with")
    given("L", model.layers, "1", "layers")
    given("d", model.hidden, "1", "hidden size")
    given("H", model.heads, "1", "query heads")
    given("K", model.kv_heads, "1", "key-value heads")
    given("e", model.head_dim, "1", "head size")
    given("V", model.vocab, "1", "vocabulary")
    given("w_s", model.score_width, "1", "multiply-adds per query-key pair and layer")
    given("S", model.attended(context), "1", "keys that a query meets, mean over the layers")


def training(sheet: Sheet, job: Training) -> None:
    """FLOPs of the whole job."""
    model = job.model
    shapes(sheet, model, job.seq)
    sheet.given("D", job.tokens, "1", "training tokens")
    sheet.given("s", job.seq, "1", "tokens of a sequence")
    sheet.given("B", job.global_batch, "1", "sequences per step")
    sheet.line("F_fwd", "2 * N_mm + 2 * L * w_s * S", "FLOP", "forward, per token", "products only; attention in full")
    sheet.given("k_b", 1 + job.trainable, "1", "products of the backward pass per forward one",
                "one for the inputs' gradients, one for the trained weights'")  # fmt: skip
    sheet.given("k_h", 1.0 if job.trainable < 1 else 2.0, "1", "the same for the output head")
    sheet.line("F_tok", "F_fwd * (1 + k_b)", "FLOP", "forward and backward, per token")
    sheet.line("C", "F_tok * D", "FLOP", "the whole job")
    active = "N_act" if model.experts else "N"
    sheet.line("C_6", f"6 * {active} * D", "FLOP", "the rule of thumb, for comparison", "arXiv 2001.08361, §2.1")
    sheet.line("steps", "D / (B * s)", "1", "optimizer steps")


def layer_shapes(sheet: Sheet, job: Training) -> None:
    """Weights, widths and bytes of the mean layer."""
    model, policy = job.model, POLICIES[job.policy]
    given, e = sheet.given, model.experts
    a = policy.activation
    per_layer = (model.matmul_params - (model.vocab * model.hidden if model.causal else 0)) / model.layers
    given("W", per_layer, "1", "weights of one layer that a token meets")
    gates = 2 if model.gated else 1
    dense, mixed = model.dense_layers / model.layers, model.mixture_layers / model.layers
    inner = dense * model.ffn + (mixed * (e.active * e.ffn + e.shared_ffn) if e else 0.0)
    all_experts = mixed * e.count * model.mlp_matmul(e.ffn) if e else 0.0
    active_experts = mixed * e.active * model.mlp_matmul(e.ffn) if e else 0.0
    given("W_all", per_layer - active_experts + all_experts, "1", "weights of one layer, all experts")
    if e:
        given("W_ex", all_experts, "1", "of them in experts")
        given("x_ex", active_experts / per_layer, "1", "share of the products in experts")
        given("x_l", mixed, "1", "share of layers with experts")
        given("k_ex", e.active, "1", "experts per token")
    given("a", a, "B", f"per activation ({job.policy})")
    given("w_b", policy.weight, "B", "per weight")
    given("g_b", policy.grad, "B", "per gradient")
    heads = model.heads * model.head_dim
    keys = model.kv_heads * model.head_dim
    given("f", inner, "1", "inner size of the MLP that a token meets, mean over layers")
    given("x_g", gates, "1", "products into the MLP" + (": gate and value" if model.gated else ""))
    given("q_n", 2 * a * model.norms_per_layer, "B", "norms: read, write; per token and channel")
    given("q_d", 2 * (3 * a + job.dropout), "B", "residual adds" + (" and dropout" if job.dropout else ""))
    rotary = 2 * a * (heads + keys) if not model.positions else 0.0
    given("q_a", rotary + (gates + 1) * a * inner, "B", "activation function" + (" and rotary" if rotary else ""))
    if not job.flash:
        given("q_s", 4 * a + (2 * a + 1) * job.dropout, "B",
              "per score: written, softmax, read" + (", dropout" if job.dropout else ""))  # fmt: skip
