"""What a step of score distillation costs with a latent teacher: ours against the widespread practice, interleaved.

python benchmarks/sds_step.py [--repeats N] [--batch N]     prints two tables; exit status 1 when a bar is missed

The net and the autoencoder are random and small, in Stable Diffusion's cost proportions: U-Net .80, decode 2.51,
encode 1.12 TFLOP. Both ways encode the pictures with gradient. The transcription asks the U-Net twice (with and without
the prompt) and decodes the latents at every step, for a picture that no loss uses. Gradients are those of one draw.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.diffusion.codec import Autoencoder
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Network
from limbeck.core.diffusion.guidance import guide
from limbeck.core.diffusion.process import VP
from limbeck.core.diffusion.time import weight
from limbeck.core.distillation import operators
from limbeck.core.run.rng import generator

SIDE, WIDTH, SCALE = 128, 96, 100.0  # pixels a side, of the text, of guidance
COSTS = {"U-Net": 0.80, "decode": 2.51, "encode": 1.12}
FASTER, ALIKE, NEAR = 1.4, 1e-4, 0.1  # bars: times faster, relative difference of gradients, of the proportions
Picture = Callable[[Tensor], Tensor]


def networks() -> tuple[Denoiser, Autoencoder]:
    """A U-Net and an autoencoder in Stable Diffusion's layout, an eighth as wide."""
    torch.manual_seed(0)
    kinds = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), down_block_types=kinds[0], up_block_types=kinds[1], latent_channels=4,
        layers_per_block=2, norm_num_groups=8)  # fmt: skip
    net = UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(40, 88, 168, 168), layers_per_block=2, cross_attention_dim=WIDTH,
        attention_head_dim=8, norm_num_groups=8)  # fmt: skip
    call = lambda net, x, t, cond: net(x, t, encoder_hidden_states=cond["states"], return_dict=False)[0]  # noqa: E731
    denoiser = Network(net, VP(), "eps", call, time_scale="index")
    return denoiser.eval().requires_grad_(False), Autoencoder(vae.eval(), 0.18215).requires_grad_(False)


def proportions(denoiser: Denoiser, codec: Autoencoder) -> dict[str, float]:
    """Operations of one forward of each part, as they are counted, in units of 10^9."""
    picture, latent = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 4, SIDE // 8, SIDE // 8)
    parts: dict[str, Callable[[], object]] = {
        "U-Net": lambda: denoiser.predict(latent, torch.full((1,), 0.5), condition(1)),
        "decode": lambda: codec.decode(latent),
        "encode": lambda: codec.encode(picture),
    }
    found = {}
    for name, part in parts.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part()
        found[name] = counter.get_total_flops() / 1e9
    return found


def condition(batch: int) -> Encoded:
    """Random text states, the same for every call."""
    return {"states": torch.randn(1, 77, WIDTH, generator=generator(0, "states", 0)).expand(batch, -1, -1)}


def steps(denoiser: Denoiser, codec: Autoencoder, batch: int) -> tuple[Picture, Picture]:
    """Ours and the transcription: pictures [B,3,S,S] -> their gradient."""
    cond, null = condition(batch), {"states": torch.zeros(1, 77, WIDTH)}
    eps = torch.randn(batch, 4, SIDE // 8, SIDE // 8, generator=generator(0, "eps", 0))
    t = torch.rand(batch, generator=generator(0, "t", 0)) * 0.96 + 0.02
    guided, process = guide(denoiser, null, SCALE), denoiser.process

    def ours(pictures: Tensor) -> Tensor:
        latent = codec.encode(pictures)
        with torch.no_grad():
            teacher = guided.predict(process.add_noise(latent, eps, t), t, cond)
            residual, w = operators.sds(teacher, eps), weight("sigma2", process, t)
        (slope,) = torch.autograd.grad(operators.surrogate(latent, residual, w), pictures)
        return slope

    def theirs(pictures: Tensor) -> Tensor:
        latent = codec.encode(pictures)
        with torch.no_grad():
            noisy = process.add_noise(latent, eps, t)
            uncond = denoiser.predict(noisy, t, null).eps
            text = denoiser.predict(noisy, t, cond).eps
            codec.decode(latent)
            sigma = process.coefficients(t, latent)[1]
            slope = sigma.square() * (uncond + SCALE * (text - uncond) - eps)
        loss = 0.5 * (latent - (latent - slope).detach()).square().sum() / batch
        (found,) = torch.autograd.grad(loss, pictures)
        return found

    return ours, theirs


def seconds(step: Picture, pictures: Tensor) -> float:
    """CPU time of one call."""
    began = time.process_time()
    step(pictures)
    return time.process_time() - began


def main(arguments: list[str] | None = None) -> int:
    """Both tables; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    denoiser, codec = networks()
    found, missed = proportions(denoiser, codec), []
    print("| one forward | GFLOP | share of decode | Stable Diffusion's |\n|---|---|---|---|")
    for name, cost in found.items():
        share, wanted = cost / found["decode"], COSTS[name] / COSTS["decode"]
        print(f"| {name} | {cost:.2f} | {share:.3f} | {wanted:.3f} |")
        missed += [f"{name}: {share:.3f} of decode, not {wanted:.3f}"] if abs(share / wanted - 1) > NEAR else []
    ours, theirs = steps(denoiser, codec, given.batch)
    pictures = torch.rand(given.batch, 3, SIDE, SIDE, generator=generator(0, "pictures", 0)).requires_grad_()
    one, two = ours(pictures), theirs(pictures)
    apart = float((one - two).norm() / two.norm())
    pairs = [(seconds(ours, pictures), seconds(theirs, pictures)) for _ in range(given.repeats)]
    fast, slow = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"\n| batch {given.batch} | ours, s | transcription, s | faster | gradients apart |\n|---|---|---|---|---|")
    print(f"| a step | {fast:.3f} | {slow:.3f} | {ratio:.2f} | {apart:.1e} |")
    missed += [f"{ratio:.2f} times faster, the bar is {FASTER:g}"] if ratio < FASTER else []
    missed += [f"gradients differ by {apart:.1e}, the bar is {ALIKE:g}"] if apart > ALIKE else []
    print("\n".join(f"missed: {line}" for line in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
