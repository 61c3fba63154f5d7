"""What a training step will cost on one GPU, from the sizes alone: DiT passes, FLOPs, memory. Nothing is trained.

    python stage2_dual.py --preset wan1.3b --dry-run            # the same with any stage, preset and constants

A pass is a forward alone (1 F), one whose gradient is wanted at its input (F + d F), or a full one, of the weights too
(F + b F). Nominally d = 1 and b = 2; flash attention computes its scores again for either, so with a share `a` of
attention in F, d = 1 + 1.5 a and b = 2 + 0.5 a. Activation checkpointing adds F to both.
"""
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import model as M

# bytes a parameter: fp32 weight, gradient, two Adam moments, and the bf16 copy that autocast keeps of what is trained
BYTES = {"trained": 16 + 2, "adapted": 4, "average": 4, "frozen": 4, "frozen bf16": 2}

# bytes a parameter in a checkpoint: fp32 weights, and the two moments of what is trained; those of adapters are small
KEPT = {"trained": 4 + 8, "adapted": 4, "average": 4, "frozen": 4, "frozen bf16": 0}


def forward_flops(name, shape):
    """(FLOPs of one forward of this model on latents (1, C, T, H, W), the share of self-attention in them)."""
    with torch.device("meta"):
        net, z = M.build(name), torch.zeros(1, *shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(z, torch.zeros(1), z, torch.zeros(1, *net.prompts.shape[1:]))
    total, tokens, row = counter.get_total_flops(), shape[1] * shape[2] * shape[3] // 4, M.MODELS[name]
    return total, 4 * tokens ** 2 * row["dim"] * row["layers"] / total


def saved_bytes(name, kept, lora=0):
    """Bytes a token that one block keeps for its backward under bf16 autocast. kept: "trained": of its weights too;
    "adapted": of adapters of rank `lora`; "input": of its input alone."""
    row, sizes = M.MODELS[name], []
    net = M.DiT(**row | dict(layers=1)).requires_grad_(kept == "trained")
    if kept == "adapted":
        M.LoRA(net, lora)
    block, = net.blocks
    for tokens in (64, 128):                                            # in their difference weights and prompt cancel
        seen = {}                                                       # storage: (bytes, the tensor, kept alive)

        def pack(x, seen=seen):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x
        x = torch.randn(1, tokens, row["dim"], requires_grad=True)
        table = M.rope_table(1, 8, tokens // 8, row["dim"] // row["heads"], 10000, x.device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            block(x * 1, torch.zeros(1, 6, row["dim"]), torch.zeros(1, 8, row["dim"]), table)
        sizes.append(sum(n for n, _ in seen.values()))
    return (sizes[1] - sizes[0]) / 64


def report(title, cfg, passes, clips=1):
    """Print the table and return {"forwards", "flops", "bytes"} of a step. passes: {network: (how it is kept, passes
    forward alone, with input gradient, full)}; clips: how many samples a pass takes for each of cfg.batch."""
    row, crop, shape = M.MODELS[cfg.model], data.clip_row(cfg.model)["crop"], data.crop_shape(cfg.model)
    tokens = math.prod(shape) // 4
    with torch.device("meta"):
        net = M.build(cfg.model)
        count, adapters = sum(p.numel() for p in net.parameters()), 0
        if any(kept == "adapted" for kept, *_ in passes.values()):
            adapters = sum(p.numel() for p in M.LoRA(net, cfg.lora).parameters())
    forward, a = forward_flops(cfg.model, (16, *shape))
    again, samples = int(cfg.checkpointing), cfg.batch * clips
    print(f"{title}, {cfg.model}: {count / 1e6:.2f} M parameters; F = {forward / 1e12:.3g} TFLOP, {a:.0%} attention, "
          f"for a clip of {4 * shape[0] - 3} frames of {crop}x{crop}, {tokens} tokens")
    print(f"{samples} clips a pass, {cfg.accumulate} passes a step; counts are per step and GPU\n")
    print(f"{'network':15}{'kept':>12}{'alone':>7}{'input':>7}{'full':>7}{'F nominal':>11}{'TFLOP':>11}{'GB':>8}")
    total = {"forwards": 0, "flops": 0, "bytes": 0}
    for name, (kept, alone, to_input, full) in passes.items():
        nominal = alone + 2 * to_input + 3 * full + again * (to_input + full)
        flops = samples * forward * (nominal + 1.5 * a * to_input + 0.5 * a * full)
        size = count * BYTES[kept] + adapters * BYTES["trained"] * (kept == "adapted")
        print(f"{name:15s}{kept:>12s}{alone:7d}{to_input:7d}{full:7d}{nominal:11d}{flops / 1e12:11,.2f}"
              f"{size / 1e9:8.2f}")
        for key, value in zip(total, (nominal, flops, size), strict=True):
            total[key] += value
    # graphs that are alive at once: the one of a full pass, and one for each network that passes a gradient on
    graphs = ["trained"] * any(full for *_, full in passes.values()) + [
        "adapted" if kept == "adapted" else "input" for kept, _, to_input, _ in passes.values() if to_input]
    per_token = {kind: saved_bytes(cfg.model, kind, vars(cfg).get("lora", 0)) for kind in set(graphs)}
    block = [samples * tokens * per_token[kind] for kind in graphs]
    inputs = samples * tokens * 4 * row["dim"] * row["layers"]
    activations = sum(inputs if again else row["layers"] * b for b in block) + again * max(block)
    total["bytes"] += activations
    print(f"{'activations':15s}{'with' if again else 'without':>12s} checkpointing, {len(graphs)} graphs at once"
          f"{activations / 1e9:29.2f}")
    print(f"{'total':15s}{'':33s}{total['forwards']:11d}{total['flops'] / 1e12:11,.2f}{total['bytes'] / 1e9:8.2f}\n")
    disk = count * sum(KEPT[kept] for name, (kept, *_) in passes.items() if name != "reference") / 1e9
    print(f"A checkpoint takes about {disk:.3g} GB of disk, twice that while it is written\n")
    print("Not counted: the discriminator head, the CUDA context (1 GB), fragments (5 to 10 %), under torchrun with "
          "accumulate DDP's buckets (4 bytes a trained parameter of one network), the video code in the panels, and "
          "making the clips: cache them with data.py prepare --latents.")
    return total
