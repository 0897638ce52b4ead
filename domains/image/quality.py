"""The metric `image.quality`: a student beside its teacher at several numbers of steps, and beside real pictures.

All numbers are taken on 64 fixed principal components of EfficientNet-lite0 features of pictures of the 256 evaluation
names (retrieval@1 on 128). One half of the reference plays the generator in the row "data": its FD-lite0 is the floor,
its retrieval@1 the ceiling.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import fidelity, lite0
from limbeck.core.diffusion.denoiser import FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.lite0 import Lite0
from limbeck.core.pipelines.sampling import sample as sample_teacher
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.image import data
from limbeck.domains.image.config import Quality

FOLDER = Path(__file__).parent / "assets" / "fluent-32"
REFERENCE, TEACHER = FOLDER / "reference.safetensors", FOLDER / "teacher-features.safetensors"
SIDE = 32  # pixels a side of the reference's pictures
HALF = 8  # real pictures of each name in one half of the reference
Row = dict[str, float | str]
Note = Callable[[str], None]  # told what is being measured
Sampler = Callable[[torch.Generator, list[str]], Tensor]  # prompts -> pictures [B,3,H,W] in [-1,1]


@dataclass(frozen=True)
class Reference:
    """Real pictures of the evaluation names as features [C,M,D], with the components they are taken on."""

    mean: Tensor  # [1280]
    components: Tensor  # [1280,D], divided by one number so that the first 64 have mean variance one
    floor: Tensor  # the half that plays the generator
    real: Tensor  # the half that everything is compared with
    degraded: Tensor  # that half with noise or blur: examples for retrieval, which asks what is shown, not how cleanly

    def project(self, features: Tensor) -> Tensor:
        """lite0 features [C*M,1280], pictures of one caption together -> [C,M,D] float32."""
        return fidelity.project(features, self.mean, self.components, len(self.real))

    def examples(self) -> Tensor:
        """What a caption looks like: clean, noisy and blurred pictures [C,2*M,D]."""
        return torch.cat([self.real, self.degraded], 1)


def degrade(pictures: Tensor) -> Tensor:
    """Every other picture with noise of deviation .1, the ones between blurred over 3x3 pixels."""
    fresh = torch.randn(pictures.shape, generator=generator(0, "reference noise", 0))
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = torch.arange(len(pictures)) % 2 == 0
    return torch.where(noisy[:, None, None, None], pictures + 0.1 * fresh, blurred)


def fingerprint() -> str:
    """SHA-256 of what the reference is drawn from: pictures, names and the feature net."""
    assets = FOLDER.parent
    files = (assets / "fluent/pictures-32.webp", assets / "fluent/captions.json", lite0.ASSET / "model.safetensors")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def real_pictures(half: str) -> Tensor:
    """One half of the reference: HALF pictures of each evaluation name, one name after another [C*M,3,32,32]."""
    pictures = data.FluentData()
    chosen = torch.tensor([pictures.index[name] for name in prompts(HALF)])
    return pictures.batch(chosen, generator(0, f"reference {half}", 0), "name")[0]


def build_reference(path: Path = REFERENCE) -> None:
    """Draws, measures and writes the reference (`limbeck assets build reference`, a minute or two)."""
    net, real = Lite0(), real_pictures("real")
    sets = {"floor": real_pictures("floor"), "real": real, "degraded": degrade(real)}
    found = {name: net.features(pictures) for name, pictures in sets.items()}
    mean, components = fidelity.principal(found["real"])
    made = {name: fidelity.project(x, mean, components, len(data.EVAL_NAMES)) for name, x in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"mean": mean, "components": components, **made}, path, {"fingerprint": fingerprint()})


def load_reference(path: Path = REFERENCE) -> Reference:
    """The committed reference; refused where pictures, names or feature net have changed since."""
    if not path.exists():
        raise BadInput(f"{path.name} is missing: run `limbeck assets build reference`")
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("fingerprint") != fingerprint():
            raise BadInput(f"{path.name} is older than the embedded pictures: run `limbeck assets build reference`")
        return Reference(**{field.name: file.get_tensor(field.name) for field in fields(Reference)})


def digest(net: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, by name, in float32."""
    total = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()


def student_sampler(model: Model, student: FewStep | ManyStep) -> Sampler:
    """The student in its own number of steps, without guidance."""

    def sample(gen: torch.Generator, prompts: list[str]) -> Tensor:
        draws = [noise(model, gen, len(prompts)) for _ in range(student.draws)]
        return model.codec.decode(student.sample(draws[0], model.encode(prompts), draws[1:]).x)

    return sample


def teacher_sampler(model: Model, steps: int, guidance: float | None) -> Sampler:
    """The teacher in its family's own sampler, from the same first noise as the student."""

    def sample(gen: torch.Generator, prompts: list[str]) -> Tensor:
        return model.codec.decode(sample_teacher(model, noise(model, gen, len(prompts)), prompts, steps, guidance))

    return sample


def noise(model: Model, gen: torch.Generator, count: int) -> Tensor:
    """Noise [count,*S] on the model's device."""
    tensors = (*model.denoiser.parameters(), *model.denoiser.buffers())
    return torch.randn(count, *model.shape, generator=gen).to(tensors[0].device)


def prompts(per_name: int) -> list[str]:
    """Each evaluation name `per_name` times, one after another."""
    return [name for name in data.EVAL_NAMES for _ in range(per_name)]


@torch.no_grad()
def measure(
    sampler: Sampler, config: Quality, reference: Reference, net: Lite0, note: Note = lambda line: None
) -> Tensor:
    """Draws config.count pictures, a batch at a time, and takes their features -> [C,M,D]."""
    texts = prompts(config.count // len(data.EVAL_NAMES))
    parts = [texts[start : start + config.batch] for start in range(0, len(texts), config.batch)]
    found = []
    for i, part in enumerate(parts):
        found.append(net.features(sized(sampler(generator(config.seed, "quality", i), part))))
        note(f"{i * config.batch + len(part)} of {len(texts)} pictures")
    return reference.project(torch.cat(found))


def sized(pictures: Tensor) -> Tensor:
    """Pictures [B,3,H,W] of any size at the reference's 32 pixels a side, by area: sharper ones are not penalised."""
    return pictures if pictures.shape[-1] == SIDE else F.interpolate(pictures, (SIDE, SIDE), mode="area")


@torch.no_grad()
def seconds(sampler: Sampler, config: Quality) -> float:
    """Wall time a picture over one batch of `timed` pictures, once its text states are known and all is warm."""
    gen, texts = generator(config.seed, "quality", 0), prompts(1)
    sampler(gen, texts[: config.timed]).cpu()
    start = time.perf_counter()
    sampler(gen, texts[: config.timed]).cpu()
    return (time.perf_counter() - start) / config.timed


def row(name: str, steps: int, found: Tensor, reference: Reference, config: Quality, took: float | None) -> Row:
    """One line of the table: everything measured on the features [C,M,D] of one generator."""
    x, real, floor = (part[..., : fidelity.FRECHET] for part in (found, reference.real, reference.floor))
    precision, recall = fidelity.precision_recall(x, real, config.neighbours)
    return {
        "generator": name,
        "steps": steps,
        "FD-lite0": fidelity.frechet_distance(x, real),
        "floor": fidelity.frechet_distance(floor[:, : x.shape[1]], real),
        "KD": fidelity.kernel_distance(x, real),
        "retrieval@1": fidelity.retrieval(found, reference.examples()),
        "spread": fidelity.spread(x, real),
        "precision": precision,
        "recall": recall,
        "seconds a picture": "" if took is None else took,
    }


def cache_key(model: Model, config: Quality) -> str:
    """What cached teacher features depend on, apart from the number of steps."""
    drawn = [config.guidance, config.count, config.seed, config.batch]
    return json.dumps([digest(model.denoiser), fingerprint(), *drawn])


def cached(model: Model, config: Quality, path: Path = TEACHER) -> dict[int, Tensor]:
    """Features by number of steps for the embedded teacher in these very settings; empty for any other."""
    if model.name != FOLDER.name or not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") != cache_key(model, config):
            return {}
        return {int(name): file.get_tensor(name) for name in file.keys()}


def build_teacher() -> None:
    """Measures the embedded teacher and writes its features (`limbeck assets build teacher-features`, minutes)."""
    from limbeck.domains.image.teacher import embedded

    write_cache(embedded(FOLDER.name), Quality())


def write_cache(model: Model, config: Quality, path: Path = TEACHER) -> None:
    """The teacher's features [C,M,D] at each number of steps, with what they depend on."""
    net, reference = Lite0(), load_reference()
    samplers = {steps: teacher_sampler(model, steps, config.guidance) for steps in config.teacher_steps}
    found = {str(steps): measure(sampler, config, reference, net) for steps, sampler in samplers.items()}
    save_file(found, path, {"key": cache_key(model, config)})


def table(
    model: Model,
    student: FewStep | ManyStep | None,
    config: Quality,
    device: str | torch.device = "cpu",
    cache: Path = TEACHER,
    note: Note = lambda line: None,
) -> list[Row]:
    """Real pictures, the student (if there is one), and the teacher at each number of steps, a row each."""
    reference, net = load_reference(), Lite0(device=device)
    known = cached(model, config, cache)
    pictures = config.count // len(data.EVAL_NAMES)
    rows = [row("data", 0, reference.floor[:, :pictures], reference, config, None)]

    def add(name: str, steps: int, sampler: Sampler, ready: Tensor | None = None) -> None:
        told = partial(_told, note, f"{name}, {steps} step{'s' * (steps > 1)}")
        found = measure(sampler, config, reference, net, told) if ready is None else ready
        rows.append(row(name, steps, found, reference, config, seconds(sampler, config)))

    if student is not None:
        add("student", student.steps, student_sampler(model, student))
    for steps in config.teacher_steps:
        add("teacher", steps, teacher_sampler(model, steps, config.guidance), known.get(steps))
    return rows


def _told(note: Note, what: str, line: str) -> None:
    note(f"{what}: {line}")


def build(config: Quality, build: Build) -> Callable[[], list[Row]]:
    """The metric `image.quality`."""

    def rows() -> list[Row]:
        student = build.piece("student") if build.has("student") else None
        return table(build.piece("teacher"), student, config, build.device, note=build.note)

    return rows
