"""Published reward models, as tiny random CLIPs on disk, against transformers' own scores; text in pictures."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import clip, legible
from limbeck.domains.image.pipelines import load_pipeline

SIDE, WIDTH, LENGTH = 28, 12, 24
PROMPTS = ["red apple", "rocket", "a man with a long beard and a hat"]  # the last one is cut
LEVEL = 1 / 255 / min(clip.STD)  # one step of 8 bits after normalisation


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with its tokenizer and preprocessing."""
    tokens, path = tiny.clip_tokenizer(), tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{end}_token_id": getattr(tokens, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    text = {**size, **ends, "vocab_size": len(tokens), "max_position_embeddings": LENGTH}
    vision = {**size, "image_size": SIDE, "patch_size": 7}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the class embedding
        net = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    gen = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data = 1.3 * torch.randn(weight.shape, generator=gen) / weight[0].numel() ** 0.5
    net.save_pretrained(path)
    tokens.save_pretrained(path)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def piece(kind: str, precision: str = "fp32", **settings: Any) -> Any:
    both = {split: [{"kind": kind, **settings}] for split in ("train", "held_out")}
    data = {"name": "r", "job": "sample", "steps": 1, "batch": 1, "precision": precision, "rewards": both}
    return Build(recipes.of(data)).piece("rewards.train.0")


def pictures(height: int, width: int) -> Tensor:
    """Three pictures of waves, discs and noise, in 8 bits."""
    gen = torch.Generator().manual_seed(height)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    wave = torch.stack([x, torch.sin(9 * y), (x * x + y * y < 0.5).float() * 2 - 1])
    noise = torch.rand(3, height, width, generator=gen) * 2 - 1
    return ((torch.stack([wave, wave.flip(0) * 0.7, noise]) + 1) * 127.5).round().byte()


def theirs(folder: Path, shown: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' own pixels and logits [B] of pictures with PROMPTS."""
    from transformers import AutoTokenizer

    pixels = CLIPImageProcessor.from_pretrained(folder)(
        images=[picture.permute(1, 2, 0).numpy() for picture in shown], return_tensors="pt"
    ).pixel_values
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        return pixels, CLIPModel.from_pretrained(folder).eval()(pixel_values=pixels, **tokens).logits_per_image.diag()


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (64, 64), (85, 128), (51, 40)])
def test_scores_are_those_of_transformers(folder: Path, shape: tuple[int, int]) -> None:
    """On 8-bit pictures, smaller and larger than the model's size, square or not; no pixel is off by over one level."""
    shown = pictures(*shape)
    x, cond = shown / 127.5 - 1, {"prompt": PROMPTS}
    pixels, logits = theirs(folder, shown)
    net = clip.load(str(folder), None, "cpu", torch.float32)
    assert (net.look(x) - pixels).abs().max() <= 1.01 * LEVEL
    net.look = lambda x: pixels  # type: ignore[assignment, misc]
    assert torch.allclose(net.scale * net.cosine(x, PROMPTS), logits, atol=1e-4)
    for kind, factor in (("image.clip", 1.0), ("image.pickscore", 1.0), ("image.hpsv2", 100 / float(net.scale))):
        found = piece(kind, model=str(folder))(x, cond)
        assert found.dtype == torch.float32 and torch.allclose(
            found, factor * logits, atol=0.1 * factor
        )  # they have a deviation of 4


def test_other_resizes_are_caught(folder: Path) -> None:
    """Bicubic without antialiasing, bilinear, and both directions before the cut: each is off by several levels."""
    for shape, settings in (
        ((64, 64), {"mode": "bicubic"}),
        ((64, 64), {"mode": "bilinear", "antialias": True}),
        ((16, 16), {"mode": "bicubic", "antialias": True}),
    ):
        shown = pictures(*shape)
        small = F.interpolate(shown / 255, (SIDE, SIDE), **settings).clamp(0, 1)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.MEAN, clip.STD))
        assert ((small - mean) / std - theirs(folder, shown)[0]).abs().max() > 4 * LEVEL


def test_a_picture_is_judged_as_it_is_seen(folder: Path) -> None:
    """Values outside [-1,1] are cut off, and have no gradient."""
    judge, x = piece("image.clip", model=str(folder)), (pictures(32, 32) / 127.5 - 1) * 1.5
    assert torch.equal(judge(x, {"prompt": PROMPTS}), judge(x.clamp(-1, 1), {"prompt": PROMPTS}))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(judge(x, {"prompt": PROMPTS}).sum(), x)
    assert (slope[x.abs() > 1] == 0).all() and (slope[x.abs() < 1] != 0).float().mean() > 0.9


def test_gradient_reaches_the_latents_through_the_decoder(folder: Path, pipeline_folder: Callable[[str], Path]) -> None:
    codec = load_pipeline(str(pipeline_folder("sd15"))).codec
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    judge, cond = piece("image.pickscore", model=str(folder), chunk=1), {"prompt": PROMPTS[:2]}
    value = judge(codec.decode(z), cond)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(slope).all() and (slope.flatten(1).norm(dim=1) > 0).all()
    direction = slope / slope.norm()
    with torch.no_grad():
        up, down = (judge(codec.decode(z + sign * 1e-2 * direction), cond).sum() for sign in (1, -1))
    assert float(up - down) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.05)


def test_a_prompt_is_read_once_and_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, calls = clip.load(str(folder), None, "cpu", torch.float32), []
    net.net.text_model.register_forward_hook(lambda *call: calls.append(1))
    together = net.texts([*PROMPTS, *PROMPTS])
    assert len(calls) == 3 and torch.equal(together[:3], together[3:])
    assert torch.equal(net.texts(PROMPTS[1:]), together[1:3]) and len(calls) == 3
    assert not together.requires_grad and torch.allclose(together.norm(dim=1), torch.ones(6))
    alone = clip.load(str(folder), None, "cpu", torch.float32).texts(PROMPTS[1:2])
    assert torch.equal(alone[0], together[1])
    net.texts(["another one that is much too long for it"])
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and f"only {LENGTH} tokens" in told and "a man with" in told


def test_the_run_s_precision_changes_little(folder: Path) -> None:
    x, cond = pictures(32, 32) / 127.5 - 1, {"prompt": PROMPTS}
    exact, half = (piece("image.clip", p, model=str(folder))(x, cond) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (exact - half).abs().max() < 0.5


def head(path: Path, width: int = WIDTH) -> nn.Sequential:
    """The aesthetic predictor's layers (dropout between them, no activation), saved under its names."""
    sizes, gen = (width, 10, 6, 4, 3, 1), torch.Generator().manual_seed(1)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.Linear(inputs, outputs), nn.Dropout(0.2)] if i < 3 else [nn.Linear(inputs, outputs)]
    made = nn.Sequential(*layers).eval()
    for value in made.parameters():
        value.data = torch.randn(value.shape, generator=gen)
    save_file({f"layers.{name}": value.contiguous() for name, value in made.state_dict().items()}, path)
    return made


def test_the_aesthetic_head_reads_unit_vectors(folder: Path, tmp_path: Path) -> None:
    layers = head(tmp_path / "head.safetensors")
    assert list(load_file(tmp_path / "head.safetensors"))[-2:] == ["layers.7.bias", "layers.7.weight"]
    judge = piece("image.aesthetic", model=str(folder), head=str(tmp_path / "head.safetensors"))
    x = (pictures(32, 32) / 127.5 - 1).requires_grad_()
    pixels, _ = theirs(folder, pictures(32, 32))
    net = CLIPModel.from_pretrained(folder).eval()
    vectors = net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)
    assert torch.allclose(judge(x, {}), layers(F.normalize(vectors, dim=-1))[:, 0], atol=0.1)
    assert not torch.allclose(judge(x, {}), layers(vectors)[:, 0], atol=1)
    assert torch.autograd.grad(judge(x, {}).sum(), x)[0].abs().sum() > 0


def refusal(kind: str = "image.clip", **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        piece(kind, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_head_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "head.safetensors", str(folder)
    assert "no safetensors file" in refusal("image.aesthetic", model=model, head=str(path))
    head(path, 20)
    assert (
        "20 numbers" in (text := refusal("image.aesthetic", model=model, head=str(path))) and f"gives {WIDTH}" in text
    )
    save_file({"layers.0.weight": torch.zeros(2, WIDTH), "layers.0.bias": torch.zeros(2)}, path)
    assert "ends in 2" in refusal("image.aesthetic", model=model, head=str(path))
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "no safetensors file" in refusal("image.aesthetic", model=model, head=str(path))


def test_models_are_named_by_the_user_and_safe(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="model"):
        piece("image.clip")
    assert "there is no folder" in refusal(model=str(tmp_path / "nothing"))
    assert "there is no folder" in refusal(model="clip")
    assert clip.locate("someone/clip", "model") == ("someone/clip", False)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickle" in refusal(model=str(copy))


def test_a_checkpoint_that_would_stay_partly_random_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "lacks text_projection.weight" in refusal(model=str(copy))
    config = copy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "siglip"}))
    assert "siglip" in refusal(model=str(copy))


def test_the_processor_may_lie_elsewhere_and_must_fit(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, bare := copy.parent / "bare")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert refusal(model=str(bare)).startswith("processor: cannot load")
    x, cond = pictures(32, 32) / 127.5 - 1, {"prompt": PROMPTS}
    beside = piece("image.clip", model=str(bare), processor=str(folder))
    assert torch.equal(beside(x, cond), piece("image.clip", model=str(folder))(x, cond))
    file = copy / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "size": 224, "crop_size": 224}))  # as in older files
    assert "224 pixels" in refusal(model=str(bare), processor=str(copy))
    file.write_text(json.dumps({**settings, "resample": 2}))
    assert "bicubic" in refusal(model=str(bare), processor=str(copy))


def test_a_reward_without_prompts_says_so(folder: Path) -> None:
    with pytest.raises(BadInput, match='the condition "prompt"'):
        piece("image.hpsv2", model=str(folder))(pictures(16, 16) / 127.5 - 1, {})


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN now"', "OPEN now"), ("a dog's bowl with 'Rex' on it", "Rex"),
        ("“one” and «two»", "one two"), ("the cats' tin, ‘fish’", "fish"),
    ],
)  # fmt: skip
def test_quotes_are_found(prompt: str, text: str) -> None:
    assert legible.quoted(prompt) == text


def test_text_without_quotes_is_refused() -> None:
    with pytest.raises(BadInput, match='write: a sign "OPEN"'):
        legible.quoted("a dog's bowl")
    assert legible.texts({"text": ["a"], "prompt": ["b"]}) == ["a"]


def test_likeness_is_one_minus_the_edit_distance() -> None:
    assert legible.edits("kitten", "sitting") == 3 and legible.edits("", "abc") == 3 == legible.edits("abc", "")
    assert legible.likeness("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert legible.likeness("open NOW", "Open now") == legible.likeness("opennow", "open now") == 1
    assert legible.likeness("", "open") == 0 and legible.likeness("open open", "open") == 0.5


def test_without_the_recogniser_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    assert refusal("image.legible_text").endswith("run `pip install 'limbeck[ocr]'`")


def test_written_text_is_read() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    judge, words = piece("image.legible_text"), ("OPEN", "Hello world")
    x = torch.stack([writing(text) for text in words])
    right = judge(x, {"prompt": [f'a sign "{text}"' for text in words]})
    wrong = judge(x, {"text": ["Hello world", "OPEN"]})
    assert not judge.differentiable and (right > 0.9).all() and (wrong < 0.5).all()
    assert (judge(torch.zeros_like(x), {"text": list(words)}) == 0).all()


def writing(text: str) -> Tensor:
    """Black letters on white, [3,128,128] in [-1,1]."""
    page = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(page).text((8, 50), text, fill="black", font=ImageFont.load_default(20))
    return torch.from_numpy(np.array(page)).permute(2, 0, 1) / 127.5 - 1
