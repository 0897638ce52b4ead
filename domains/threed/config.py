"""What a recipe may say about 3D (torch-free). Angles are in degrees, lengths in scene units."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from limbeck.core.diffusion.config import ProcessConfig, Vp
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.recipe import Reward, Strict, Student, Teacher
from limbeck.core.scheduled import Scheduled, Step, within

LINEAR = Vp.model_validate({})
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Group = Annotated[int, Field(ge=4, multiple_of=4)]
Splats = Annotated[int, Field(ge=1, le=1_000_000)]
Span = tuple[Scheduled, Scheduled]
Part = Annotated[float, Field(ge=-1, le=1)]
Colour = tuple[Part, Part, Part]
Decay = tuple[float, float, float]


class PerpNeg(Strict):
    """How a negative view weighs, -(a exp(-b r) + c), as (a, b, c); r runs from 0 to 1 over a quarter of the circle."""

    front: Decay = (4.0, 0.5, -2.426)  # from the side (0) to the front (1)
    side: Decay = (4.0, 0.5, -2.426)  # from the front (0) to the side (1)
    side_behind: Decay = (1.0, 0.5, -0.606)  # from the back (0) to the side (1)
    front_behind: Decay = (1.0, 0.5, 0.967)  # from the back (0) to the side (1)


class Law(Strict):
    """Where the cameras of a step stand: azimuths are spread over the batch, the rest is uniform."""

    prompt: str = ""  # what the asset is to be
    prompts: list[str] = []  # of a student that makes many assets: each step takes one of them instead
    size: Annotated[Scheduled, AfterValidator(within(1))] = 32  # pixels along a side
    elevation: Span = (-10.0, 50.0)
    azimuth: Span = (-180.0, 180.0)
    distance: Span = (3.0, 3.0)
    fov: Span = (40.0, 40.0)
    spread: Annotated[Scheduled, AfterValidator(within(0, 1))] = 0.33  # of its share of the circle a view may stray
    jitter: Annotated[Scheduled, AfterValidator(within(0))] = 0.0  # of where it stands, DreamFusion's .1
    background: Colour | Literal["random"] = (1.0, 1.0, 1.0)
    albedo: Annotated[Scheduled, AfterValidator(within(0, 1))] = 1.0  # share of steps without a lamp; the rest: shape
    words: bool | Literal["perp_neg"] = False  # adds ", front view" and the like, for teachers that see no camera
    front: Positive = 45.0  # half the angle that counts as front, and as back (perp_neg: views are blended instead)
    perp_neg: PerpNeg = PerpNeg()


class Solids(Strict):
    """Eight objects that are known exactly: the teacher of checks."""

    size: Count = 32
    std: Positive = 0.05  # of a picture around the true view, colours being in [-1, 1]
    process: ProcessConfig = LINEAR


class Files(Strict):
    """What exported files are like. Heights in metres; GLB is +Y up and USDZ says which way it is."""

    faces: Count = 20_000  # at most, triangles
    texture: Literal[256, 512, 1024, 2048, 4096] = 1024  # pixels along a side
    height: Positive = 1.0  # of the asset
    up: Literal["y", "z"] = "y"  # of OBJ and PLY: y has the front at +Z, z has it at -Y as Blender does
    watertight: bool = False  # never let the budget of faces open the surface
    level: Positive | None = None  # the density of the surface; null: where views stop
    resolution: Annotated[int, Field(ge=16, le=512)] = 96  # cells along the object's longest side
    normals: bool = False  # a map of what the budget of faces takes from the surface's normals (GLB)
    smooth: Annotated[int, Field(ge=0, le=200)] = 0  # Taubin's passes, which keep the volume
    ground: bool = False  # keeps a sheet below the object, which score distillation likes to add
    colours: Literal["auto", "field", "views"] = "auto"  # auto: what looks more like the views
    frames: Annotated[int, Field(ge=2, le=1000)] = 60  # of a turntable
    size: Annotated[int, Field(ge=16, le=2048)] = 192  # pixels along a side of a turntable


class Objects(Strict):
    """Views of the embedded objects with their words and cameras."""

    cameraless: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the views whose camera is not told


class FreshViews(Strict):
    """A small net that is to learn views, from random weights."""

    widths: tuple[Group, Group, Group] = (48, 96, 96)  # at 16x16, 8x8 and 4x4
    hidden: Count = 192  # of the condition
    process: ProcessConfig = LINEAR


class ViewsTeacher(Strict):
    """A trained net of views: an embedded name, or a folder that the exporter `threed.views` wrote."""

    model: str = "views-32"


class MultiView(Strict):
    """A Stable Diffusion pipeline whose U-Net denoises several views together (MVDream)."""

    of: Teacher  # image.teacher with the pipeline: Stable Diffusion 2.1 base for MVDream
    weights: str | None = None  # safetensors of the multi-view U-Net, MVDream's or diffusers'; null: the pipeline's own
    views: Count = 4  # together


class ViewsQuality(Strict):
    """What the teacher of views alone says, at the held-out cameras of every object."""

    t: Annotated[float, Field(gt=0, le=1)] = 0.98  # of the noisy picture that it is shown


class Blob(Strict):
    """Where a field starts from: density = sharp * softplus(raw + height (1 - |p| / reach))."""

    height: float = 10.0
    reach: Positive = 0.5  # scene units
    sharp: Positive = 1.0


class Voxels(Blob):
    """Density and colours on a dense grid."""

    kind: Literal["voxels"] = "voxels"
    size: Annotated[int, Field(ge=2, le=512)] = 40  # grid points along a side
    height: float = 5.0
    sharp: Positive = 3.0


class Netted(Blob):
    """A field that ends in a small net."""

    hidden: Count = 64


class Triplane(Netted):
    """Three feature planes."""

    kind: Literal["triplane"] = "triplane"
    size: Annotated[int, Field(ge=2, le=2048)] = 64  # grid points along a side
    features: Count = 16
    join: Literal["sum", "concat"] = "sum"


class HashGrid(Netted):
    """A multi-resolution hash grid; the published size is 16 levels, 19, base 16, finest 4096."""

    kind: Literal["hashgrid"] = "hashgrid"
    levels: Annotated[int, Field(ge=1, le=32)] = 8
    features: Count = 2  # a level
    entries: Annotated[int, Field(ge=4, le=24)] = 15  # binary logarithm of a level's table
    base: Count = 8  # cells along a side of the coarsest level
    finest: Count = 128
    active: Annotated[Scheduled, AfterValidator(within(1))] | None = None  # levels in use, coarse to fine; null: all


FieldConfig = Annotated[Voxels | Triplane | HashGrid, Field(discriminator="kind")]


class Sampling(Strict):
    """Where rays are looked at."""

    samples: Count = 24  # along a ray through the scene's ball
    proposal: Annotated[int, Field(ge=0)] = 24  # of a first pass without gradient that says where they lie; 0: evenly
    occupancy: Annotated[int, Field(ge=0, le=256)] = 0  # cells along a side of a grid of what is empty; 0: no grid


class Nerf(Strict):
    """Scenes seen by volume rendering."""

    field: FieldConfig = Voxels()
    sampling: Sampling = Sampling()
    radius: Positive = 1.0
    latent: bool = False  # shows the teacher's own latent channels (Latent-NeRF) instead of RGB
    particles: Count = 1
    oriented: bool = False  # normals in training too, with their gradient: for the loss `orientation`
    step: Positive | None = None  # of finite differences for normals, DreamFusion's .01; null: by autograd


class Photos(Strict):
    """A data set of pictures with their cameras: a folder with nerfstudio's transforms.json."""

    folder: str
    size: Annotated[int, Field(ge=1, le=4096)] = 64  # pixels along the longer side
    hold: Annotated[int, Field(ge=2)] = 8  # every so many pictures one is held out
    centred: bool = False  # brings the world into the scene's ball; false: it is a scene's world already, as exported


class LikePhotos(Photos):
    """The scene shows what is in pictures."""

    optim: OptimConfig = OptimConfig(lr=1e-3)  # that of the other losses on the student


class Nerfstudio(Strict):
    """Scenes of nerfstudio's parts: density = the field's times exp(height (1 - |p| / reach))."""

    field: Literal["nerfacto", "generfacto"] = "nerfacto"  # the latter's colours do not depend on the view
    levels: Annotated[int, Field(ge=1, le=32)] = 8  # of the hash grid
    entries: Annotated[int, Field(ge=4, le=24)] = 15  # binary logarithm of a level's table
    finest: Count = 128  # cells along a side of the finest level
    hidden: Count = 64  # of the nets
    samples: Count = 24  # along a ray, beside those of the first pass
    proposal: Count = 24  # of a first pass without gradient that says where they lie
    height: float = 3.0
    reach: Positive = 0.5  # scene units
    radius: Positive = 1.0
    particles: Count = 1


class Amortised(Blob):
    """One net that writes the three feature planes of a scene for any of the run's prompts."""

    size: Literal[16, 32, 64, 128] = 32  # grid points along a side of a plane
    features: Count = 16
    width: Count = 64  # channels of the net that writes them
    hidden: Count = 64  # of the net that reads them
    sampling: Sampling = Sampling()
    radius: Positive = 1.0


class Gaussians(Strict):
    """Scenes of 3D Gaussians."""

    count: Splats = 2000  # of the start
    capacity: Splats | None = None  # that there may ever be (see the loss threed.density_control); null: as many
    radius: Positive = 0.6  # scene units, of the ball that they start in
    scale: Annotated[float, Field(gt=0.0068, lt=0.2)] = 0.05  # scene units, of each
    opacity: Annotated[float, Field(gt=0, lt=1)] = 0.1
    latent: bool = False  # shows the teacher's own latent channels instead of RGB
    particles: Count = 1


class Mesh(Strict):
    """A mesh whose texture is learned; its geometry is given."""

    of: str = "ball"  # a GLB, OBJ or PLY file, the folder of a run (its asset is taken), or the built-in ball
    up: Literal["y", "z"] = "y"  # the axis that points upwards in a file
    texture: Annotated[int, Field(ge=16, le=4096)] = 128  # texels along a side: more than the views can show stay grey
    start: Literal["grey", "own"] = "grey"  # of the texture: middle grey, or what the mesh brings
    samples: Annotated[int, Field(ge=1, le=8)] = 2  # along a side of a pixel
    offsets: bool = False  # vertices may move too: see the term `laplacian` of threed.regular
    faces: Count = 4000  # at most, of a run's asset


class Latent(Strict):
    """Scenes in the teacher's latent channels (Latent-NeRF)."""

    of: Student  # threed.nerf or threed.gaussians
    rgb: Step | None = None  # the step (or share of the run) from which colours are refined; null: latents to the end


class Patches(Strict):
    """A teacher of pixels behind a linear codec, as a teacher of latents."""

    of: Teacher
    side: Annotated[int, Field(ge=2, le=16)] = 2  # pixels of a patch
    channels: Annotated[int, Field(ge=4, le=12)] = 4


class Sketch(Strict):
    """A coarse mesh that the scene keeps to."""

    guide: str = "ball"  # a GLB, OBJ or PLY file, the folder of a run, or the built-in ball
    up: Literal["y", "z"] = "y"  # the axis that points upwards in a file
    size: Positive = 0.7  # of the guide, in the scene's ball
    weight: Scheduled = 1.0
    sigma: Annotated[float, Field(ge=0)] = 0.3  # scene units around the guide's surface where it counts less; 0: none
    length: Positive = 0.2  # scene units along which density becomes occupancy
    points: Count = 2048  # a step
    optim: OptimConfig = OptimConfig(lr=1e-3)  # that of the other losses on the student


class DensityControl(Strict):
    """Where splats are added and taken away, by the gradient of the other losses on their places in the picture."""

    optim: OptimConfig = OptimConfig(lr=1e-3)  # that of the other losses on the student
    every: Count = 50  # steps
    start: Step = 100  # the first step (or share of the run) after which splats change
    end: Step = 10**9  # and the last
    threshold: Positive = 0.05  # of the gradient's mean norm over views, the picture's half side being 1
    large: Positive = 0.05  # scene units: a splat longer than that is split, a shorter one copied
    prune: Annotated[float, Field(ge=0, lt=1)] = 0.01  # opacity below which a splat goes


class Regular(Strict):
    """What scenes should be like whatever they show; each weight is that of a mean over views."""

    weight: Scheduled = 1.0  # of all of them
    optim: OptimConfig = OptimConfig(lr=1e-3)  # that of the other losses on the student
    opacity: Scheduled = 0.0  # as little as need be
    opaque: Scheduled = 0.0  # all or nothing
    orientation: Scheduled = 0.0  # what is seen faces the camera; needs student.oriented
    distortion: Scheduled = 0.0  # all along a ray at one place (mip-NeRF 360)
    variance: Scheduled = 0.0  # the same, by the variance of depth (HiFA)
    smooth: Scheduled = 0.0  # variation of voxels or planes, a mean over neighbours; 2 costs the checks 2 dB
    smooth_image: Scheduled = 0.0
    smooth_depth: Scheduled = 0.0
    size: Scheduled = 0.0  # of splats
    laplacian: Scheduled = 0.0  # bending of a mesh that moves (student.offsets)


class Assets(Strict):
    """What a run shows of its scenes, and how it exports them."""

    size: Count | None = None  # pixels along a side of what is shown; null: those of the last step
    files: Files = Files()


class Quality(Strict):
    """Scenes against their known objects at cameras that no step drew."""

    formats: list[str] = []  # files of the first scene that the evaluation leaves in the run's exports
    judge: Reward | None = None  # of pictures and prompts: R-precision, and the words of views where nothing is known
    prompts: list[str] = []  # among which it looks for the own one; none given: all objects that the teacher knows
    likeness: Reward | None = None  # of a picture and that of its condition: how steady a turntable is (A-LPIPS)
    views: Annotated[int, Field(ge=2, le=1000)] = 60  # of that turntable
