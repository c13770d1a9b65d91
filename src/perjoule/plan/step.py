"""The time of one training step of a transformer on one layout, as lines of a sheet.

A layer's forward pass on one device and one micro-batch takes

    max(product FLOPs / reached peak, product bytes / reached bandwidth)      matrix products: roofline
    + score FLOPs / reached peak  (+ score bytes / bandwidth unless fused)     attention
    + element-wise bytes / reached bandwidth                                   norms, residuals, activation, rotary
    + 2 collectives of the tensor group (+ exchange of experts, ring of keys)  communication
    + a fixed time                                                             launches and tails

the backward pass twice the products, and what recomputation repeats. A step is then
(micro-batches + (pipeline - 1) / chunks) of those, the output head, the gradients' way through the data-parallel
group, and the optimizer. Bubble and volumes: Narayanan et al. 2021 (arXiv 2104.04473, §2.2, §3.2).

Symbols are introduced by `work.given`.
"""

from __future__ import annotations

from perjoule.core.device import Device
from perjoule.core.errors import BadInput
from perjoule.plan.efficiency import KERNELS, matmul_share
from perjoule.plan.job import POLICIES, Training
from perjoule.plan.layout import Layout
from perjoule.plan.sheet import Sheet


def rates(sheet: Sheet, job: Training, device: Device) -> None:
    """What the device does per second, at best and in kernels."""
    compute = POLICIES[job.policy].compute
    wanted = compute if compute in device.peak_flops else _nearest(device, compute)
    sheet.given("peak", device.peak(wanted).value, "FLOP/s", f"dense {wanted} peak", device.peak(wanted).source)
    plain = wanted if wanted != "float8" else _nearest(device, "bfloat16")
    sheet.given("peak_a", device.peak(plain).value, "FLOP/s", f"dense {plain} peak, for attention and the head",
                device.peak(plain).source)  # fmt: skip
    if device.bandwidth_bytes_s is None:
        raise BadInput(f"{device.name} has no memory bandwidth in its spec sheet; choose another device")
    sheet.given("bw", device.bandwidth_bytes_s.value, "B/s", "memory bandwidth", device.bandwidth_bytes_s.source)
    link = device.link_bytes_s or device.network_bytes_s
    network = device.network_bytes_s or device.link_bytes_s
    sheet.given("link", link.value if link else 12.5e9, "B/s", "inside the node, per device and direction",
                link.source if link else "assumed: 100 Gbit/s")  # fmt: skip
    sheet.given("net", network.value if network else 12.5e9, "B/s", "between nodes, per device and direction",
                network.source if network else "assumed: 100 Gbit/s")  # fmt: skip
    share, source = matmul_share(device)
    k = KERNELS
    sheet.given("e_mm", share * k.matmul, "1", "reached share of the peak in matrix products", source)
    sheet.given(
        "e_at", share * k.attention, "1", "reached share of the peak in attention products", "fitted, see efficiency.py"
    )
    sheet.given(
        "e_bw", k.memory, "1", "reached share of the bandwidth in element-wise kernels", "fitted, see efficiency.py"
    )
    sheet.given("e_ln", k.link, "1", "reached share of the link in collectives", "fitted, see efficiency.py")
    sheet.given("e_nt", k.network, "1", "reached share of the network in collectives", "assumed")
    sheet.given(
        "t_fix", k.layer_s, "s", "fixed time per layer and direction: launches, tails", "fitted, see efficiency.py"
    )
    sheet.given("t_lat", k.latency_s, "s", "latency of a collective", "assumed")


def _nearest(device: Device, dtype: str) -> str:
    """What stands in where a device has no peak for `dtype`: 16 bits for 16, 32 for 32; else an error."""
    for other in {"bfloat16": ("float16",), "float16": ("bfloat16",), "float32": ("tfloat32",)}.get(dtype, ()):
        if other in device.peak_flops:
            return other
    device.peak(dtype)
    raise AssertionError


def placement(sheet: Sheet, layout: Layout, node: int) -> None:
    """The layout's numbers. Tensor ranks are neighbours, then context, then data; pipelines cross nodes."""
    for symbol, value, meaning in (
        ("t", layout.tensor, "tensor-parallel ranks"),
        ("p", layout.pipeline, "pipeline stages"),
        ("c", layout.context, "context-parallel ranks"),
        ("dp", layout.data, "data-parallel ranks"),
        ("b", layout.micro_batch, "sequences per micro-batch"),
        ("v", layout.interleave, "model chunks per stage"),
        ("ep", layout.expert, "ranks that share the experts of a layer"),
    ):
        sheet.given(symbol, value, "1", meaning)
    sheet.line("n", "t * p * c * dp", "1", "devices")
    sheet.line("L_p", "ceil(L / (p * v)) * v", "1", "layers of the fullest stage")
    sheet.line("m", "B / (b * dp)", "1", "micro-batches per step")
    sheet.given("u", layout.tensor if layout.sequence else 1, "1", "ranks that share norms and dropouts")
    inside = layout.tensor * layout.context * layout.data <= node
    fast, slow = ("link", "e_ln"), ("net", "e_nt")
    speed, reached = fast if inside else slow
    sheet.line(
        "bw_dp", f"{speed} * {reached}", "B/s", f"gradients travel {'inside the node' if inside else 'between nodes'}"
    )
    near = layout.pipeline * layout.tensor * layout.context * layout.data <= node
    speed, reached = fast if near else slow
    sheet.line("bw_pp", f"{speed} * {reached}", "B/s", "between pipeline stages")
    near = layout.tensor * layout.context <= node
    speed, reached = fast if near else slow
    sheet.line("bw_cp", f"{speed} * {reached}", "B/s", "around the context ring")
    sheet.given("node", node, "1", "devices of a node")


def layer(sheet: Sheet, job: Training, layout: Layout) -> None:
    """Forward and backward time of one layer (the mean layer, where they differ) on one micro-batch."""
    line, model = sheet.line, job.model
    line("T", "b * s / c", "1", "tokens of a micro-batch on one device")
    line("G", "2 * T * W / t", "FLOP", "matrix products of one layer, forward")
    line("A", "2 * T * S * w_s / t", "FLOP", "attention products of one layer, forward")
    line("i_o", "4 * d + (2 * H * e + 2 * K * e + (1 + x_g) * f) / t", "1",
         "values that the products of one layer read and write, per token")  # fmt: skip
    touched = "W_all / t"
    if model.experts:
        sheet.given("e_ex", KERNELS.expert, "1", "reached share of grouped products against plain ones", "assumed")
        line("W_r", "W_all - W_ex + W_ex / ep", "1", "weights of one layer on its devices")
        touched = "W_r / t"
        line("t_G", f"max((G + (1 / e_ex - 1) * x_ex * G) / (peak * e_mm), a * ({touched} + T * i_o) / (bw * e_bw))",
             "s", "matrix products")  # fmt: skip
    else:
        line("t_G", f"max(G / (peak * e_mm), a * ({touched} + T * i_o) / (bw * e_bw))", "s", "matrix products")
    line("t_A", "A / (peak_a * e_at)", "s", "attention products")
    line("M_f", "T * (q_n * d / u + q_d * d / u + q_a / t)", "B", "element-wise traffic, forward")
    line("M_b", "T * (2 * q_n * d / u + 0.86 * q_d * d / u + 1.5 * q_a / t)", "B", "element-wise traffic, backward")
    if not job.flash:
        line("M_s", "q_s * T * S * H / t", "B", "score traffic, forward")
        line("M_sb", "(q_s + 3 * a) * T * S * H / t", "B", "score traffic, backward")
    scores, scores_b = ("", "") if job.flash else (" + M_s", " + M_sb")
    comm = _communication(sheet, layout, model.experts is not None)
    line("t_f", f"t_G + t_A + (M_f{scores}) / (bw * e_bw){comm} + t_fix", "s", "one layer, forward")
    again = " + t_A / 2" if job.flash else ""
    line("t_b", f"k_b * t_G + 2 * t_A{again} + (M_b{scores_b}) / (bw * e_bw){comm} + t_fix", "s",
         "one layer, backward" + (" (fused attention computes its scores again)" if job.flash else ""))  # fmt: skip
    if layout.recompute == "full":
        line("t_r", "t_f", "s", "recomputed: the whole layer")
    elif layout.recompute == "selective" and not job.flash:
        line("t_r", "t_A / 2 + (q_s - a) * T * S * H / t / (bw * e_bw)", "s", "recomputed: the attention scores")
    elif layout.recompute == "selective":
        line("t_r", "T * (q_n * d / u + q_a / t) / (bw * e_bw)", "s", "recomputed: norms and activation function")
    else:
        sheet.given("t_r", 0.0, "s", "nothing is recomputed beyond what fused attention does")
    line("t_l", "t_f + t_b + t_r", "s", "one layer, forward and backward")


def _communication(sheet: Sheet, layout: Layout, mixture: bool) -> str:
    """Lines for what one layer sends in one direction of the pass; returns the terms to add."""
    terms = ""
    if layout.tensor > 1:
        sheet.line("t_ar", "2 * (t - 1) / t * a * T * d / (link * e_ln) + t_lat", "s",
                   "one all-reduce of the tensor group", "ring: 2 (t-1)/t of the data")  # fmt: skip
        terms += " + 2 * t_ar"
    if layout.context > 1:
        sheet.line("t_ring", "(c - 1) / c * 2 * K * e * a * b * s / t / bw_cp", "s", "keys and values around the ring")
        sheet.line("t_cp", "max(t_ring - t_A, 0) + c * t_lat", "s", "of it not hidden under attention")
        terms += " + t_cp"
    if mixture and layout.expert > 1:
        sheet.line("B_ep", "a * T * d / u", "B", "of one device's tokens, once")
        sheet.line("t_ep", "2 * (min(ep, node) - 1) / min(ep, node) * k_ex * B_ep / (link * e_ln)", "s",
                   "tokens to their experts and back, inside the node")  # fmt: skip
        sheet.line("t_en", "2 * (1 - min(ep, node) / ep) * min(k_ex, ep / min(ep, node)) * B_ep / (net * e_nt)", "s",
                   "between nodes: once per node, as in DeepEP")  # fmt: skip
        sheet.given("o_ep", KERNELS.exchange, "1", "share of the experts' exchange that nothing hides", "assumed")
        sheet.line("t_xx", "x_l * (o_ep * max(t_ep, t_en) + 2 * t_lat)", "s", "exchange of experts, mean layer")
        terms += " + t_xx"
    return terms


def step(sheet: Sheet, job: Training, layout: Layout) -> float:
    """Seconds of one optimizer step at best; lines `t_step`, `mfu`, `hfu` are its result."""
    line = sheet.line
    line("t_h", "(2 + k_h) * 2 * T * d * V / t / (peak_a * e_mm) + 20 * T * V / t / (bw * e_bw)", "s",
         "output head, loss and their backward, one micro-batch")  # fmt: skip
    line("t_m", "t_l * L_p", "s", "one micro-batch through one stage, both directions")
    line("t_pipe", "t_m * (m + (p - 1) / v) + m * t_h", "s", "all micro-batches and the bubble",
         "bubble: arXiv 2104.04473, §2.2")  # fmt: skip
    total = "t_pipe"
    if layout.pipeline > 1:
        line("t_pp", "2 * v * (m + p - 1) * (a * T * d / t / bw_pp + t_lat)", "s", "activations between stages")
        total += " + t_pp"
    if layout.data * layout.context > 1:
        total += _gradients(sheet, layout)
    sheet.given("q_o", job.update_bytes, "B", f"{job.optimizer}: moved per trained parameter")
    line("t_opt", "q_o * P_o / (bw * e_bw)", "s", "optimizer step")
    line("t_step", f"{total} + t_opt", "s", "one step at best")
    line("F_step", "F_tok * B * s", "FLOP", "model FLOPs of one step")
    line("mfu", "F_step / (t_step * n * peak)", "1", "model FLOP utilisation at best",
         "PaLM, arXiv 2204.02311, appendix B")  # fmt: skip
    return sheet["t_step"]


def _gradients(sheet: Sheet, layout: Layout) -> str:
    """Lines for the data-parallel group; returns the term to add."""
    line = sheet.line
    if layout.zero == 3:
        line("t_dp", "m * (g_r - 1) / g_r * (2 * w_c * P_d + g_b * P_t) / bw_dp", "s",
             "weights gathered twice, gradients scattered, every micro-batch", "arXiv 1910.02054, §7")  # fmt: skip
        sheet.given("o", KERNELS.overlap, "1", "share of the pass that hides weights on their way", "assumed")
        line("t_x", "max(t_dp - o * t_m * m, 0.05 * t_dp)", "s", "of it in plain sight")
        return " + t_x"
    if layout.zero:
        line("t_dp", "(g_r - 1) / g_r * (g_b + w_b) * P_t / bw_dp", "s", "gradients scattered, new weights gathered")
    else:
        line("t_dp", "2 * (g_r - 1) / g_r * g_b * P_t / bw_dp", "s", "all-reduce of the gradients")
    if layout.pipeline > 1:
        return " + t_dp"
    sheet.given(
        "o", KERNELS.overlap, "1", "share of the last backward pass that hides gradients on their way", "assumed"
    )
    line("t_x", "max(t_dp - o * t_b * L_p, 0.05 * t_dp)", "s", "of it in plain sight")
    return " + t_x"
