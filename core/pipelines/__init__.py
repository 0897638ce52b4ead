"""Real diffusers pipelines as teachers: what all families of all domains share (one file a family in the domains)."""

from limbeck.core.pipelines.loading import PipelineModel
from limbeck.core.pipelines.sampling import guided, sample

__all__ = ["PipelineModel", "guided", "sample"]
