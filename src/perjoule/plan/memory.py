"""Bytes on one device: states and activations, as lines of a sheet, and the moment of a step that needs the most.

States per parameter are the policy's (16 or 18 bytes with Adam), divided by what ZeRO shares (Rajbhandari et al.
2020, arXiv 1910.02054, §5). Activations of a layer are summed tensor by tensor; for a GPT layer with dropout and
without fused attention the sum is the closed form of Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1-6):

    s*b*d * (10 + 24/t + 5*H*s/(d*t))           tensor parallel
    s*b*d * (34/t + 5*H*s/(d*t))                and sequence parallel
    s*b*d * 34/t                                and selective recomputation
    2*s*b*d                                     full recomputation (here divided by t with sequence parallelism)

The first pipeline stage keeps min(m, p) micro-batches, times 1 + (p-1)/(p*m') when interleaved in m' chunks.

States, activations and logits do not all peak together. Gradients come into being while activations go, so a step has
four moments, and the device must hold the worst of them; tests/plan/test_real_memory.py measures them on PyTorch:

    loss    all activations, the logits and their gradients           no gradients of weights yet, unless accumulated
    top     the backward pass enters the last layer                   the head's gradient, the layer's transient ones
    end     it leaves the first one                                   all gradients, one layer's activations
    root    embeddings' gradients are added up, or scattered          all gradients

Stage 3 is PyTorch's `fully_shard` (FSDP2) on every layer and the rest: embeddings and head stay gathered from the
forward to the end of the backward pass; a layer is gathered into a buffer and copied out of it, the next one is
fetched meanwhile; its gradients are whole until they are copied into the buffer of the reduce-scatter, which is kept
until the next layer's (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py).

The optimizer is taken to run in one kernel; PyTorch's `foreach` needs another float32 per parameter at its step.
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
    given("w_c", policy.gathered or policy.weight, "B", "per gathered weight, and per gradient before it is scattered")
    whole = "M_w + M_g + M_o"
    if stage <= 1 and layout.data * layout.context > 1 and not job.bucket_view and job.policy != "megatron":
        line("M_dd", "g_b * P_t", "B", "gradients again, in the buckets of DDP", "gradient_as_bucket_view=False")
        whole += " + M_dd"
    if stage == 3:
        line("M_1", "W_all / t * w_c", "B", "one layer, gathered")
        line("M_r", "P_e / t / min(p, 2) * w_c", "B", "embeddings and head, gathered")
        line("M_z", "2 * M_1 + M_r", "B", "gathered: this layer and the next, embeddings")
        whole += " + M_z"
    line("M_state", whole, "B", "states")


def activations(sheet: Sheet, job: Training, layout: Layout) -> None:
    """What the forward pass keeps for the backward pass on the first stage."""
    model, line, given = job.model, sheet.line, sheet.given
    policy, drop = POLICIES[job.policy], job.dropout
    lean = layout.recompute == "selective" and job.flash
    a = policy.activation
    stream = policy.stream or a
    written = not (job.fused or model.norm_bias)
    given("k_n", stream + 4 * written, "B", "kept by a norm, per channel" + ", in float32 too" * written)
    inputs = 0 if lean else (3 + 1 + model.gated if policy.cast else 2)
    given("k_u", sheet["k_n"] * model.norms_per_layer + a * inputs + 2 * drop, "B",
          "norms' inputs" + ("" if lean else ", block inputs") + ", dropout masks" * drop)  # fmt: skip
    inner = 1 if lean else 2 if job.fused or model.gated else 5
    line("k_t", f"(2 * a * H * e + 2 * a * K * e + {inner} * x_g * a * f) / d", "B",
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
    again = "0"
    if layout.recompute == "full":
        line("A_k", f"{stream} * T * d / u * L_p", "B", "inputs of layers, per micro-batch")
        again = "A_l + A_s"
        line("M_k", "A_k * flight", "B", "kept when the loss is reached")
    elif layout.recompute == "selective" and not job.flash:
        again = "A_s"
        line("M_k", "A_l * L_p * flight", "B", "kept when the loss is reached")
    else:
        line("M_k", "(A_l + A_s) * L_p * flight", "B", "kept when the loss is reached")
    line("A_w", again, "B", "of one layer, while it is recomputed")
    line("M_a", "M_k + A_w", "B", "activations")
    _loss(sheet, job, layout)
    _moments(sheet, job, layout)


def _loss(sheet: Sheet, job: Training, layout: Layout) -> None:
    """Logits, in float32 for the loss: its log-softmax is kept, and two gradients of it are alive at once."""
    line = sheet.line
    if layout.pipeline > 1:
        line("G_h", "0", "B", "gradient of the head: on another stage")
        line("M_l", "0", "B", "logits and what the loss keeps: on another stage")
        return
    gradient = "w_c" if layout.zero == 3 else "g_b"
    line("G_h", f"V * d / t * {gradient} * {int(job.trainable == 1)}", "B", "gradient of the head")
    ends = "T * d * (k_n + a)"
    if job.policy == "megatron":
        line("M_l", f"T * V / t * (4 + a) + {ends}", "B", "logits and what the loss keeps", "gradient in their place")
    else:
        line("M_l", f"max(12 * T * V / t, a * T * V / t + G_h) + {ends}", "B", "logits and what the loss keeps")


def _moments(sheet: Sheet, job: Training, layout: Layout) -> None:
    """Needs at the four moments; M_peak is the greatest."""
    line, policy, stage = sheet.line, POLICIES[job.policy], layout.zero
    scores = ", 2 * a * H * S" * (not job.flash)
    line("A_t", f"T * (2 * a * d / u + {f'max(x_g * a * f{scores})' if scores else 'x_g * a * f'} / t)", "B",
         "gradients of activations inside one layer")  # fmt: skip
    buckets = "M_dd" in sheet
    whole = job.policy == "megatron" or (stage <= 1 and layout.data * layout.context > 1 and not buckets)
    line("M_p", "M_g" if whole else "M_g * min(1, m - 1)", "B", "gradients that are there when a pass begins",
         "as buckets" if whole else "of earlier micro-batches")  # fmt: skip
    base, gathered = "M_w + M_o" + " + M_dd" * buckets, " + M_r" * (stage == 3)
    cast, layer = "", ""
    if policy.cast:
        head = " + V * d" * (layout.pipeline == 1)
        line("M_v", f"{policy.cast} * (W_all * L_p{head}) / t", "B", "weights cast for the products, kept by autocast")
        cast, layer = " + M_v", f" + {policy.cast} * W_all / t"
    line("M_loss", f"{base} + M_p{gathered}{cast} + M_k + M_l", "B", "moment: the loss and its backward pass")
    line("A_1", "M_k / (L_p * flight)", "B", "of it, gone with each layer")
    made = "w_c" if stage == 3 else "g_b"
    line("G_d", f"f * d / t * {made} * x_t", "B", "gradient of the MLP's last product: the first that a layer makes")
    line("G_l", "(M_g - M_p) / L_p", "B", "gradients that come with each layer")
    again = job.model.tied and job.model.causal and layout.pipeline == 1
    if stage == 3:
        line("g_s", "max(g_b, w_c)", "B", "per gradient on its way")
        line("M_s", "W_all / t * g_s * x_t", "B", "gradients of one layer on their way to be scattered")
        # gathered: this layer and the next; its gradients, as many bytes as its weights, are whole when its activations
        # are gone; those of the layer before are on their way
        new = "G_h"
        top = "2 * M_1 + max(A_w + A_t + G_d + max(0, M_s - A_1), M_1 * x_t + max(0, M_s - A_1) - A_1)"
        last = "M_1 + M_s + max(A_l + A_s + A_t + G_d, M_1 * x_t) + G_h + max(0, M_1 + A_1 - G_l)"
        # a tied head's gradient is added to by the embedding's; an untied one's is held by fully_shard meanwhile
        root = "P_e / t / min(p, 2) * (w_c + max(w_c, g_s) * x_t) + G_h"
    else:
        new, top = "G_h * (M_g - M_p) / M_g", "A_w + A_t + G_d"
        last = "A_l + A_s + A_t + G_d"
        root = f"V * d / t * g_b * {'1' if again else 'min(1, m - 1)'}"
    line("M_top", f"{base} + M_p{gathered}{cast} + {new} + M_k + {top}", "B", "moment: backward of the last layer")
    line("M_end", f"{base} + M_g - G_l{gathered}{layer} + {last}", "B", "moment: backward of the first layers")
    line("M_root", f"{base} + M_g + {root}", "B", "moment: gradients of the embeddings")
    line("M_peak", "max(M_loss, M_top, M_end, M_root)", "B", "the worst of them")


def total(sheet: Sheet, device: Device) -> None:
    """The device's memory against the need."""
    context = CONTEXT_BYTES if device.kind == "gpu" else 0.0
    sheet.given("M_c", context, "B", "memory of runtime and collectives", "assumed" if context else "")
    sheet.line("M_need", f"M_peak * {1 + RESERVE} + M_c", "B", "memory per device, fragments included")
