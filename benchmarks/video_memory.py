"""What student, critic and teacher cost on one shared base against three copies, and what tiling does to a decode.

python benchmarks/video_memory.py            prints markdown tables; exit status 1 when a bar is missed

Bytes of parameters and of Adam's state are counted tensor by tensor and must be those of the shapes; the large nets are
built and stepped without memory (torch's meta device). Peaks are bytes that torch's CPU allocator had given out.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from meter import peak
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import FewStep, Model, Network
from limbeck.core.diffusion.guidance import guide
from limbeck.core.diffusion.process import Flow
from limbeck.core.distillation.config import CriticConfig
from limbeck.core.distillation.critic import Critic
from limbeck.core.distillation.operators import dmd, surrogate
from limbeck.core.distillation.students import trainable
from limbeck.core.pipelines.family import ATTENTION
from limbeck.core.pipelines.loading import in_net_dtype
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws, generator

SHARE = 0.4  # bar: of the copies' bytes
MAKING, JOINING = (
    2,
    5,
)  # bar of a tiled decode: a tile's peak and so many outputs; later, when tiles are joined, outputs
TILE, STRIDE, LATENT = 32, 24, 8  # pixels: of a tile, between tiles, of a latent
Sizes = tuple[int, int, int, int]  # heads, width of one, width of the feed-forward, layers
NETS: dict[str, tuple[Sizes, int, int, str]] = {  # sizes, width of the text, rank, where
    "small": ((2, 48, 560, 4), 256, 4, "cpu"),
    "Wan 2.1 1.3B": ((12, 128, 8960, 30), 4096, 64, "meta"),
    "Wan 2.1 14B": ((40, 128, 13824, 40), 4096, 64, "meta"),
}
DECODES = ((3, 4), (3, 8), (3, 12), (3, 16), (2, 12), (5, 12))  # latent frames, latents a side


def wan(sizes: Sizes, text: int, device: str, dtype: torch.dtype) -> Model:
    """Diffusers' transformer of Wan as a teacher of latents [16,3,8,8]; weights of seed 0."""
    heads, width, inner, layers = sizes
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        net = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width, ffn_dim=inner, num_layers=layers, text_dim=text,
        )  # fmt: skip
    kept = net._keep_in_fp32_modules  # as in folders that are loaded in half precision
    for name, parameter in net.requires_grad_(False).named_parameters():
        parameter.data = parameter.data.to(torch.float32 if set(name.split(".")) & set(kept) else dtype)
    call = lambda net, x, t, cond: net(x, t, cond["states"], return_dict=False)[0]  # noqa: E731
    made = Network(net.eval(), Flow(), "flow", in_net_dtype(call), 1000.0)
    encode = lambda prompts: {"states": torch.zeros(len(prompts), 16, text, dtype=dtype)}  # noqa: E731
    return Model(made, (16, 3, 8, 8), Identity(), encode, "wan")


@dataclass
class Trio:
    """Teacher, student and critic of one model, the latter two with their optimisers."""

    model: Model
    student: FewStep
    critic: Critic
    players: list[Player]

    @classmethod
    def of(cls, model: Model, rank: int, shared: bool) -> "Trio":
        """LoRA on the teacher itself (the student's on its attention, the critic's on all layers), or full copies."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            student = FewStep(trainable(model, rank if shared else None, targets=ATTENTION), (1.0,))
            config = CriticConfig(kind="lora" if shared else "full", rank=rank)
            critic = Critic.of(config, model, model.encode([""]), next(model.denoiser.parameters()).device)
        nets = {"student": student, "critic": critic.denoiser}
        return cls(model, student, critic, [Player(name, net, OptimConfig(), 1) for name, net in nets.items()])

    def held(self) -> int:
        """Bytes of all parameters and of the optimisers' tensors, each counted once."""
        nets: tuple[nn.Module, ...] = (self.model.denoiser, self.student, self.critic.denoiser)
        slots = (slot for player in self.players for state in player.optim.state.values() for slot in state.values())
        return size([*(p for net in nets for p in net.parameters()), *slots])

    def touch(self) -> None:
        """One update from gradients of zero: Adam makes its state at the first."""
        for player in self.players:
            for p in player.tensors:
                p.grad = torch.zeros_like(p)
            player.step(0)

    def step(self) -> None:
        """One step of DMD2: the student against teacher and critic, then the critic on what the student made."""
        ctx, cond = Context(1, "memory", Draws(0, 1, 1), 1, 0, torch.device("cpu")), self.model.encode([""])
        x = self.student.sample(ctx.draws.normal("noise", self.model.shape), cond).x
        with torch.no_grad():
            t = torch.full((1,), 0.5)
            x_t = self.model.denoiser.process.add_noise(x, ctx.draws.normal("eps", self.model.shape), t)
            teacher = guide(self.model.denoiser, cond, 5.0).predict(x_t, t, cond)
            r = dmd(x, teacher, self.critic.denoiser.predict(x_t, t, cond))
        surrogate(x, r).backward()
        self.players[0].step(1)
        self.critic.loss(ctx, "critic", x, cond).backward()
        self.players[1].step(1)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes, each tensor once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def expected(model: Model, rank: int, shared: bool) -> int:
    """What the shapes say: trained weights in float32 with two moments, a counter of four bytes for each tensor."""
    base = [(p.numel(), p.element_size()) for p in model.denoiser.parameters()]
    teacher = sum(n * bytes_ for n, bytes_ in base)
    if not shared:
        return teacher + 2 * sum(3 * 4 * n + 4 for n, _ in base)
    layers = {name: m.weight for name, m in model.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    attention = [w for name, w in layers.items() if name.endswith(tuple(f".{target}" for target in ATTENTION))]
    return teacher + sum(2 * 4 + 3 * 4 * rank * sum(w.shape) for w in [*layers.values(), *attention])


def share(name: str, dtype: torch.dtype) -> tuple[str, list[str]]:
    """A row of the first table, and what breaks its bars."""
    sizes, text, rank, device = NETS[name]
    held, peaks, wrong = [], [], []
    for shared in (True, False):
        trio = Trio.of(wan(sizes, text, device, dtype), rank, shared)
        trio.touch()
        held.append(trio.held())
        peaks.append(held[-1] + peak(trio.step) if device == "cpu" else None)
        if held[-1] != expected(trio.model, rank, shared):
            wrong.append(f"{name}: {held[-1]} bytes held, {expected(trio.model, rank, shared)} by the shapes")
    if held[0] > SHARE * held[1]:
        wrong.append(f"{name}: {held[0] / held[1]:.3f} of the copies' bytes")
    weights = sum(p.numel() for p in trio.model.denoiser.parameters())
    shown = [f"{found / 1e6:.1f}" if found else "" for found in peaks]
    kind = str(dtype).removeprefix("torch.")
    row = [name, f"{weights / 1e6:.2f}", kind, rank, f"{held[0]:,}", f"{held[1]:,}", f"{held[0] / held[1]:.3f}", *shown]
    return f"| {' | '.join(map(str, row))} |", wrong


def decode(vae: nn.Module, frames: int, side: int, tiled: bool) -> int:
    """Bytes at the peak of one decode."""
    vae.disable_tiling()  # type: ignore[operator]
    if tiled:
        vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)  # type: ignore[operator]
    z = torch.randn(1, 16, frames, side, side, generator=generator(0, "latents", frames))
    with torch.no_grad():
        return peak(lambda: vae.decode(z))  # type: ignore[operator]


def tiling(base: int, decodes: Iterable[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Rows of the second table, and what breaks its bar."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=base).eval().requires_grad_(False)
    rows, wrong = [], []
    for frames, side in decodes:
        plain, tiled, tile = decode(vae, frames, side, False), decode(vae, frames, side, True), TILE // LATENT
        output = 4 * 3 * (4 * (frames - 1) + 1) * (side * LATENT) ** 2
        bound = max(decode(vae, frames, tile, False) + MAKING * output, JOINING * output)
        megabytes = " | ".join(f"{found / 1e6:.2f}" for found in (output, plain, tiled, bound))
        clip = f"{4 * frames - 3} x {side * LATENT} x {side * LATENT}"
        rows.append(f"| {frames} | {clip} | {megabytes} | {tiled / plain:.3f} |")
        if tiled > bound:
            wrong.append(f"a clip {clip} takes {tiled} bytes in tiles, {bound} are the bound")
    return rows, wrong


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--base", type=int, default=8, help="width of the autoencoder")
    parser.add_argument("--decodes", type=int, nargs="+", default=[n for pair in DECODES for n in pair],
                        help="latent frames and latents a side, in pairs")  # fmt: skip
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wrong = []
    print("| net | weights, M | base | rank | shared base, bytes | three copies, bytes | share | peak of a step, MB | "
          "of the copies, MB |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name in args.nets:
        for dtype in (torch.float32, torch.bfloat16):
            row, missed = share(name, dtype)
            wrong += missed
            print(row, flush=True)
    rows, missed = tiling(args.base, list(zip(args.decodes[::2], args.decodes[1::2], strict=True)))
    print(f"\ntiles of {TILE} pixels every {STRIDE}\n\n| latent frames | clip | output, MB | peak, MB | in tiles, MB | "
          "bound, MB | share |\n|---|---|---|---|---|---|---|")  # fmt: skip
    print("\n".join(rows) + "\n")
    print("pass" if not wrong + missed else "missed: " + "; ".join(wrong + missed))
    return bool(wrong + missed)


if __name__ == "__main__":
    sys.exit(main())
