"""Measures of generated pictures, as pure functions of features in float64.

Features come as [C,M,D]: C captions, M pictures of each, D components (see quality.py for where they come from);
the first argument is what is judged, the second the reference. Sets of pictures without captions are [N,D].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.run.errors import BadInput

MIN_COUNT = 1024
COMPONENTS, FRECHET = 128, 64  # principal components kept; all measures but retrieval@1 use the first 64
SHRINK = 0.1  # share of the mean variance added to each direction before whitening


def project(features: Tensor, mean: Tensor, components: Tensor, captions: int) -> Tensor:
    """Features [C*M,W] on the components [W,D], less their mean [W] -> [C,M,D]."""
    out = (features.double() - mean.double()) @ components.double()
    return out.float().view(captions, -1, components.shape[1])


def principal(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [W] and principal components [W,D] of features [N,W], the first 64 of mean variance one."""
    mean = features.double().mean(0)
    _, singular, basis = torch.linalg.svd(features.double() - mean, full_matrices=False)
    scale = (singular[:FRECHET].square().mean() / len(features)).sqrt()
    return mean.float(), (basis[:COMPONENTS].T / scale).float().contiguous()


def flat(x: Tensor) -> Tensor:
    """[C,M,D] or [N,D] -> float64 [N,D]."""
    return x.double().flatten(0, -2)


def covariance(x: Tensor) -> Tensor:
    """Unbiased covariance [D,D] of [N,D]."""
    centred = x - x.mean(0)
    products: Tensor = centred.T @ centred
    return products / (len(x) - 1)


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    half: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return half


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson & Landau 1982)."""
    half = root(cov_a)
    cross = torch.linalg.eigvalsh(half @ cov_b @ half).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_distance(x: Tensor, reference: Tensor) -> float:
    """Frechet distance between the Gaussians of two feature sets (Heusel et al. 2017, eq. 6, on our own features).

    Biased upwards by the number of pictures: compare only equal numbers, and with the floor of real pictures.
    """
    a, b = flat(x), flat(reference)
    fewest = min(len(a), len(b))
    if fewest < MIN_COUNT:
        raise BadInput(f"a Frechet distance needs at least {MIN_COUNT} pictures a side, not {fewest}: raise count")
    return frechet(a.mean(0), covariance(a), b.mean(0), covariance(b))


def kernel_distance(x: Tensor, reference: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y/D + 1)^3 (Binkowski et al. 2018, section 4), over all pairs.

    Near zero, and slightly negative, for real pictures: both sets have the same captions.
    """
    a, b = flat(x), flat(reference)
    within_a, within_b, between = _cubic(a, a), _cubic(b, b), _cubic(a, b)
    n, m = len(a), len(b)
    own_a = (within_a.sum() - within_a.trace()) / (n * (n - 1))
    own_b = (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(own_a + own_b - 2 * between.mean())


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def whitener(reference: Tensor) -> Tensor:
    """[C,M,D] -> [D,D] that makes the covariance within captions (shrunk towards its mean) the unit matrix."""
    captions, pictures, width = reference.shape
    residual = flat(reference - reference.mean(1, keepdim=True))
    within = residual.T @ residual / (captions * (pictures - 1))
    values, vectors = torch.linalg.eigh(within + SHRINK * within.diagonal().mean() * torch.eye(width).to(within))
    white: Tensor = vectors * values.rsqrt()
    return white


def retrieval(x: Tensor, reference: Tensor) -> float:
    """Share of pictures whose nearest caption prototype is their own: retrieval@1 over the C captions.

    A prototype is the mean of a caption's reference pictures; nearness is the cosine after whitening within captions.
    """
    reference = reference.double()
    prototypes = reference.mean(1)
    origin, white = prototypes.mean(0), whitener(reference)
    wanted = F.normalize((prototypes - origin) @ white, dim=-1)
    found = (F.normalize((x.double() - origin) @ white, dim=-1) @ wanted.T).argmax(-1)
    return float((found == torch.arange(len(x))[:, None]).double().mean())


def pair_distance(x: Tensor) -> float:
    """Mean distance between two pictures of one caption, averaged over captions, of [C,M,D]."""
    captions, pictures, _ = x.shape
    if pictures < 2:
        raise BadInput("a spread within captions needs at least two pictures of each caption: raise count")
    return float(torch.cdist(x.double(), x.double()).sum() / (captions * pictures * (pictures - 1)))


def spread(x: Tensor, reference: Tensor) -> float:
    """Within-caption spread relative to the data's: 1 for data against data, 0 where each caption gives one picture."""
    return pair_distance(x) / pair_distance(reference)


def coverage(x: Tensor, reference: Tensor, neighbours: int) -> float:
    """Share of x inside the reference's manifold: a ball to the k-th neighbour round each of its pictures."""
    a, b = flat(x), flat(reference)
    radius = torch.cdist(b, b).kthvalue(neighbours + 1, dim=1).values  # the nearest is the picture itself
    return float((torch.cdist(a, b) <= radius).any(1).double().mean())


def precision_recall(x: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, eq. 1-2), on the same number of pictures of each caption.

    k = 3 as in the paper; with four pictures a caption a fifth neighbour belongs to another caption, and even a
    generator with one picture a caption gets a recall of .94. Balls round far-off real pictures are wide, so that junk
    can have a precision of .5: read it beside the Frechet distance.
    """
    pictures = min(x.shape[1], reference.shape[1])
    x, reference = x[:, :pictures], reference[:, :pictures]
    return coverage(x, reference, neighbours), coverage(reference, x, neighbours)
