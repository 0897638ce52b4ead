"""InstructVideo: the frames a reward is asked of, the walk from data, what learns, and the patch on the video net."""

import pytest
import torch

from limbeck.core.alignment import backprop
from limbeck.core.alignment import config as alignment
from limbeck.core.diffusion.codec import Identity
from limbeck.core.distillation.lora import Patched, merged
from limbeck.core.rewards.base import Reward
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import Draws, generator
from limbeck.domains.video import instruct_checks as checks
from limbeck.domains.video.instruct import attenuation, of_frames, segmental

torch.set_num_threads(1)
TINY = ["teacher={kind: video.fresh, channels: [16, 16]}"]


def failed(found):
    return [i for i, check in enumerate(found) if not check.passed]


def test_every_segment_gives_each_of_its_frames_and_no_other():
    for frames, segments, sizes in ((16, 4, [4, 4, 4, 4]), (8, 8, [1] * 8), (7, 3, [2, 2, 3])):
        index = segmental(500, frames, segments, generator(0, "t", 0))
        found = [set(column.tolist()) for column in index.T]
        assert [len(one) for one in found] == sizes and sorted(set().union(*found)) == list(range(frames))
    with pytest.raises(BadInput, match="5 segments of clips of 4 frames; set segments=4 or less"):
        segmental(1, 4, 5, generator(0, "t", 0))


def test_what_the_segments_weigh_and_what_wrong_weights_would():
    assert failed(checks.weights()) == []
    middle = lambda i, frames, decay: torch.exp(-decay * (i - (frames - 1) / 2).abs())  # noqa: E731
    assert 0 in failed(checks.weights(middle))
    summed = lambda i, frames, decay: attenuation(i, frames, decay) / attenuation(i, frames, decay).mean()  # noqa: E731
    assert 2 in failed(checks.weights(summed))
    at = attenuation(torch.tensor([0, 8, 15]), 16, 0.1)
    assert torch.allclose(at, torch.tensor([0.449, 1.0, 0.497]), atol=1e-3)  # the card's other measurement


def test_the_walk_starts_at_index_551_and_cutting_or_shifting_the_share_is_caught():
    assert failed(checks.start()) == []
    assert failed(checks.start(lambda times, share: times[-int(share * (len(times) - 1)) - 1 :])) == [2]
    assert failed(checks.start(lambda times, share: times[-round(share * (len(times) - 1)) :])) == [0, 1, 2]
    assert len(backprop.remaining(torch.arange(6), 0.01)) == 2  # one step at least


class Dark(Identity):
    """Decoders that break the graph."""

    def __init__(self, clamp):
        self.clamp = clamp

    def read(self, z, space):
        return z.clamp(5, 6) if self.clamp else z.detach()


def test_only_the_last_step_learns_and_a_longer_or_a_broken_graph_is_caught():
    assert failed(checks.gradient()) == []
    two = checks.EDIT.model_copy(update={"last": 2})
    assert failed(checks.gradient(two)) == [0]
    assert [failed(checks.gradient(codec=Dark(clamp))) for clamp in (True, False)] == [[1], [1]]


def test_the_middle_frame_brightens_most():
    assert failed(checks.centre()) == []


def test_the_walk_starts_from_the_data_with_noise_that_a_frame_shares():
    tuning = checks.brightened(1.0)
    edit, walk, t = alignment.Edit(offset=3.0), checks.EDIT.walk, torch.tensor(0.6)
    x, _, raw = tuning.edited(Context(0, "s", Draws(0, 0, 500), 1, 0, torch.device("cpu")), walk, edit, t)
    draws = Draws(0, 0, 500)
    x0 = checks.Still().batch(500, draws.gen("data.batch"), slice(0, 500)).x
    noise = (x - 0.4 * x0) / 0.6
    assert torch.allclose(noise.var(), torch.tensor(10.0), rtol=0.05)
    assert torch.allclose(noise.flatten(3).var(-1).mean(), torch.tensor(1.0), rtol=0.05)  # within a frame
    assert raw == {"prompt": [""] * 500}
    started = backprop.started(tuning, checks.EDIT, Context(0, "s", Draws(0, 0, 4), 1, 0, torch.device("cpu")))
    assert torch.allclose(started[-1], tuning.times(walk)[8:]) and len(started[-1]) == 13


def test_the_reward_sees_each_frame_under_its_own_prompt_and_no_other_frame_has_a_gradient():
    seen = {}

    def score(x, cond, *, t, gen):
        seen.update(cond, x=x)
        return x.flatten(1).mean(1)

    reward = of_frames(Reward(score, "mean", "pixels", differentiable=True), 2, 0.5)
    x = torch.randn(3, 3, 6, 2, 2, requires_grad=True)
    found = reward(x, {"prompt": ["a", "b", "c"], "n": torch.arange(3)}, gen=generator(0, "t", 0))
    assert seen["prompt"] == ["a", "a", "b", "b", "c", "c"] and seen["n"].tolist() == [0, 0, 1, 1, 2, 2]
    index = segmental(3, 6, 2, generator(0, "t", 0))
    frames = torch.stack([x[i, :, k] for i in range(3) for k in index[i]])
    assert torch.equal(seen["x"], frames) and reward.space == "frames" and reward.differentiable
    assert torch.allclose(found, (attenuation(index, 6, 0.5) * frames.flatten(1).mean(1).view(3, 2)).mean(1))
    found.sum().backward()
    touched = x.grad.abs().sum((1, 3, 4)) > 0
    assert all(touched[i].nonzero()[:, 0].tolist() == index[i].tolist() for i in range(3))


def test_the_recipe_has_both_sides_of_the_embedded_reward_and_a_patch_on_the_video_net():
    build = Build(recipes.load("video/instructvideo", TINY))
    student, model = build.piece("student"), build.piece("teacher")
    x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])
    cond = model.encode(["dog face", "fish"])
    values = [build.piece(f"rewards.{side}.0")(x, {"prompt": ["dog face", "fish"]}) for side in ("train", "held_out")]
    assert all(value.shape == (2,) and value.abs().max() < 1 for value in values)
    patch, base = student.denoiser, model.denoiser
    assert isinstance(patch, Patched) and len(patch.lora.up) == 4 * 18  # q, k, v and out of 18 attentions
    plain = base.predict(x, t, cond, features=True)
    assert torch.equal(patch.predict(x, t, cond).raw, plain.raw) and plain.features[0].shape[:3] == (2, 16, 8)
    alone = base.predict(x[1:], t[1:], {key: value[1:] for key, value in cond.items()}, features=True)
    assert torch.allclose(alone.features[0], plain.features[0][1:], atol=1e-5)
    for up in patch.lora.up.values():
        torch.nn.init.normal_(up.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(base.net.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    moved = patch.predict(x, t, cond).raw
    moved.square().sum().backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(up.weight.grad.abs().sum() > 0 for up in patch.lora.up.values())
    before = base.predict(x, t, cond).raw
    assert (moved - before).abs().max() > 1e-3 and merged(base) is base
    assert torch.allclose(merged(patch).predict(x, t, cond).raw, moved, atol=1e-4)


def test_a_reward_that_judges_no_pictures_is_refused():
    sets = [*TINY, "rewards.train=[{kind: video.frames, of: {kind: toy.letters}}]"]
    with pytest.raises(BadInput, match="letters judges tokens, not pictures; name a reward on pictures"):
        Build(recipes.load("video/instructvideo", sets)).piece("rewards.train.0")
