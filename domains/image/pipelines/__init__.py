"""Real image pipelines as teachers: Stable Diffusion 1.x/2.x, XL and 3, Flux, PixArt (one file a family)."""

from limbeck.domains.image.pipelines.loading import KNOWN, PipelineModel, load_pipeline
from limbeck.domains.image.pipelines.sampling import guided, sample

__all__ = ["KNOWN", "PipelineModel", "guided", "load_pipeline", "sample"]
