"""Bytes on one device: states and activations, as lines of a sheet.

States per parameter are the policy's (16 or 18 bytes with Adam), divided by what ZeRO shares (Rajbhandari et al.
2020, arXiv 1910.02054, §5). Activations of a layer are summed tensor by tensor; for a GPT layer with dropout and
without fused attention the sum is the closed form of Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1-6):

    s*b*d * (10 + 24/t + 5*H*s/(d*t))           tensor parallel
    s*b*d * (34/t + 5*H*s/(d*t))                and sequence parallel
    s*b*d * 34/t                                and selective recomputation
    2*s*b*d                                     full recomputation (here divided by t with sequence parallelism)

The first pipeline stage keeps min(m, p) micro-batches, times 1 + (p-1)/(p*m') when interleaved in m' chunks.
"""

from __future__ import annotations

from perjoule.core.device import Device
from perjoule.plan.job import POLICIES, Training
from perjoule.plan.layout import Layout
from perjoule.plan.sheet import Sheet

CONTEXT_BYTES = 1.0e9
"""Of an accelerator that its runtime and its collectives keep (assumed)."""
RESERVE = 0.06
"""Of the memory lost to fragments (assumed)."""


def states(sheet: Sheet, job: Training, layout: Layout) -> None:
    """Weights, gradients and optimizer states; introduces P_d and P_t, parameters and trained ones per device."""
    model, policy = job.model, POLICIES[job.policy]
    line, given = sheet.line, sheet.given
    given("P_e", model.embedding + model.head, "1", "parameters of embeddings and head")
    routed = 0.0
    if model.experts and model.experts.count > model.experts.active:
        unused = model.params - model.active_params
        routed = unused * model.experts.count / (model.experts.count - model.experts.active)
    given("P_x", routed, "1", "parameters of routed experts")
    line(
        "P_n",
        "(N - P_e - P_x) / t * L_p / L + P_e / t / min(p, 2)",
        "1",
        "parameters on the fullest device, experts apart",
    )
    line("P_r", "P_x / t * L_p / L", "1", "parameters of experts on one stage, all ranks")
    given("x_t", job.trainable, "1", "share that is trained")
    line("P_d", "P_n + P_r / ep", "1", "parameters on the fullest device")
    line("P_t", "P_d * x_t", "1", "trained ones on it")
    line("g_r", "dp * c", "1", "ranks that hold the same weights")
    stage = layout.zero
    given("z_w", layout.data * layout.context if stage == 3 else 1, "1", "ranks that share weights")
    given("z_g", layout.data * layout.context if stage >= 2 else 1, "1", "ranks that share gradients")
    given("z_o", layout.data * layout.context if stage >= 1 else 1, "1", "ranks that share optimizer states")
    frozen = job.weight_bytes or policy.weight
    given("w_f", frozen, "B", "per frozen weight")
    line("M_w", "(w_b * x_t + w_f * (1 - x_t)) * (P_n / z_w + P_r / max(ep, z_w))", "B", "weights")
    line("M_g", "g_b * x_t * (P_n / z_g + P_r / max(ep, z_g))", "B", "gradients")
    given("o_b", job.state_bytes, "B",
          f"{job.optimizer} states" + ", float32 weights" * bool(policy.master) + ", per trained weight")  # fmt: skip
    line("P_o", "x_t * (P_n / z_o + P_r / max(ep, z_o))", "1", "parameters whose optimizer states live here")
    line("M_o", "o_b * P_o", "B", "optimizer")
    total = "M_w + M_g + M_o"
    if stage == 3:
        line("M_z", "2 * (W_all / t * w_b) + P_e / t * w_b / min(p, 2)", "B",
             "gathered: this block and the next, embeddings")  # fmt: skip
        total += " + M_z"
    line("M_state", total, "B", "states")


def activations(sheet: Sheet, job: Training, layout: Layout) -> None:
    """What the forward pass keeps for the backward pass on the first stage."""
    model, line, given = job.model, sheet.line, sheet.given
    a, drop = POLICIES[job.policy].activation, job.dropout
    lean = layout.recompute == "selective" and job.flash
    given("k_u", a * (model.norms_per_layer + 2 * (not lean)) + 2 * drop, "B",
          "norms' inputs" + ("" if lean else ", block inputs") + ", dropout masks" * drop)  # fmt: skip
    line("k_t", f"(2 * a * H * e + 2 * a * K * e + {1 if lean else 2} * x_g * a * f) / d", "B",
         "queries, keys, values, attention's result, MLP's inner values; per hidden channel")  # fmt: skip
    # ranks of one sequence: block inputs are whole on every tensor rank unless sequence parallelism splits them
    line("A_l", "T * d * (k_u / u + k_t / t)", "B", "kept by one layer, beside attention scores")
    if job.flash:
        line("A_s", "4 * T * H / t", "B", "fused attention: one log-sum per query")
    else:
        given("k_s", 2 * a + drop if drop else a, "B", "per attention score")
        line("A_s", "k_s * H * T * S / t", "B", "attention scores")
    line(
        "flight",
        "min(m, p) * (1 + (p - 1) / (p * v) * min(1, v - 1))",
        "1",
        "micro-batches in flight on the first stage",
    )
    if layout.recompute == "full":
        line("A_k", "a * T * d / u * L_p", "B", "inputs of layers, per micro-batch")
        line("A_w", "A_l + A_s", "B", "one layer while it is recomputed")
        line("M_a", "A_k * flight + A_w", "B", "activations")
    elif layout.recompute == "selective" and not job.flash:
        line("M_a", "A_l * L_p * flight + A_s", "B", "activations")
    else:
        line("M_a", "(A_l + A_s) * L_p * flight", "B", "activations")
    line(
        "M_l",
        "0" if layout.pipeline > 1 else "T * (V / t * (4 + a) + 2 * a * d)",
        "B",
        "logits and what the loss keeps",
    )


def total(sheet: Sheet, device: Device) -> None:
    """The device's memory against the need."""
    context = CONTEXT_BYTES if device.kind == "gpu" else 0.0
    sheet.given("M_c", context, "B", "memory of runtime and collectives", "assumed" if context else "")
    sheet.line("M_need", f"(M_state + M_a + M_l) * {1 + RESERVE} + M_c", "B", "memory per device, fragments included")
