"""The training step of the paper's network, and how much of the machine it uses."""

import time
from typing import Any

from benchmarks import ours
from benchmarks.report import Spread, bars, faster, peak, table
from benchmarks.workers import Contender, Send, alternate

TITLE = "Training step of the paper's network"
PAPER, GFLOP = 35_746_307, 37.5  # the network's parameters; its operations per image, forward and backward
MATMUL = "matrix multiplication"
EXAMPLE = "diffusers, as its example ships"
PAIRS = [
    ("ours, fastest, fp32", "diffusers, best, fp32"),
    ("ours, fastest, bf16", "diffusers, best, bf16"),
    ("ours, fastest, bf16", EXAMPLE),
    ("ours, reproducible, fp32", EXAMPLE),
    ("ours, fastest, fp32", "denoising-diffusion-pytorch, as it ships"),
    ("ours, fastest, bf16", "denoising-diffusion-pytorch, amp, bf16"),
]


def matmul(send: Send, size: int) -> None:
    """Turns that measure products of square matrices: the best GFLOP/s of several, by precision."""
    import torch

    cuda = torch.cuda.is_available()
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"tf32": torch.float32} if cuda else {})
    while True:
        rates = {}
        for kind, dtype in kinds.items():
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            a = torch.rand(size, size, dtype=dtype, device="cuda" if cuda else "cpu")
            times = []
            for _ in range(10):
                start = time.perf_counter()
                torch.mm(a, a)[0, 0].item()  # .item() waits for a GPU
                times.append(time.perf_counter() - start)
            rates[kind] = 2 * size**3 / min(times) / 1e9
        send(rates)


def measure(quick: bool, compiled: bool) -> dict[str, Any]:
    """The answers of all contenders, turn by turn."""
    import torch

    cuda = torch.cuda.is_available()
    batch, steps, channels = (2, 1, 32) if quick else (128, 50, 128) if cuda else (8, 2, 128)
    common = {"channels": channels, "batch": batch, "steps": steps}

    def mine(name: str, fast: bool, precision: str) -> Contender:
        overrides = [
            f"train.precision={precision}",
            *ours.FASTEST * fast,
            *["train.compile=true"] * (compiled and fast),
        ]
        settings = common | {"size": 32, "overrides": overrides}
        return Contender(f"ours, {name}", "benchmarks.ours:training", settings, ours.environment(not fast))

    def diffusers(name: str, best: bool, precision: str) -> Contender:
        settings = common | {"best": best, "precision": precision, "compiled": compiled and best}
        return Contender(name, "benchmarks.peers:diffusers_training", settings)

    def third(name: str, amp: bool) -> Contender:
        function = "benchmarks.peers:ddpm_pytorch_training"
        return Contender(f"denoising-diffusion-pytorch, {name}", function, common | {"amp": amp})

    contenders = [
        Contender(MATMUL, "benchmarks.train_step:matmul", {"size": 256 if quick else 8192 if cuda else 2048}),
        mine("reproducible, fp32", False, "fp32"),
        mine("fastest, fp32", True, "fp32"),
        mine("fastest, bf16", True, "bf16"),
        diffusers(EXAMPLE, False, "fp32"),
        diffusers("diffusers, best, fp32", True, "fp32"),
        diffusers("diffusers, best, bf16", True, "bf16"),
        third("as it ships", False),
        third("amp, bf16", True),
    ]
    turns = alternate(contenders, [None] * (1 if quick else 5))
    rates = turns.pop(MATMUL)
    rate = {kind: max(turn[kind] for turn in rates) for kind in rates[0]}
    return {"batch": batch, "compiled": compiled, "gflops": rate, "turns": turns}


def page(result: dict[str, Any]) -> str:
    """The tables."""
    turns, rate, batch = result["turns"], result["gflops"], result["batch"]
    rows = []
    for name, answers in turns.items():
        kind = "bf16" if name.endswith("bf16") else "tf32" if "tf32" in rate and "reproducible" not in name else "fp32"
        seconds = Spread.of(answer["seconds"] for answer in answers)
        count = answers[0]["parameters"]
        share = f"{batch * GFLOP / seconds.median / rate[kind]:.0%} of {kind}" if count == PAPER else "–"
        rows.append((name, f"{count / 1e6:.1f} M", seconds, faster(turns, name, EXAMPLE), share, peak(answers)))
    head = (
        "contender",
        "parameters",
        "seconds per step",
        "times as fast as diffusers' example",
        "share of the machine",
    )
    measured = ", ".join(f"{value:,.0f} GFLOP/s in {kind}" for kind, value in rate.items())
    compiled = ", torch.compile for ours at its fastest and diffusers at its best" if result["compiled"] else ""
    return (
        f"A full step (forward, backward, clipping, optimizer, schedule, EMA), batch {batch}{compiled}. The share is "
        f"of the machine's rate of matrix multiplication, measured in the same rounds: {measured}; a step of the "
        f"paper's network takes {GFLOP} GFLOP per image.\n\n{table((*head, 'peak MiB'), rows)}\n"
    ) + table(("ours", "peer", "times as fast"), [(a, b, faster(turns, a, b)) for a, b in PAIRS])


def chart(result: dict[str, Any]) -> dict[str, Any]:
    """Images per second."""
    return bars(result["turns"], result["batch"])
