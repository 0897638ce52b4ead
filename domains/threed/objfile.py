"""Meshes in the older formats: OBJ with its material and picture, PLY with colours of vertices, USDZ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.glb import png

MATERIAL = """newmtl asset
Ka 1 1 1
Kd 1 1 1
Ks 0 0 0
illum 1
map_Kd {picture}
"""


def lines(head: str, rows: np.ndarray, form: str) -> str:
    """A line a row."""
    return "".join(f"{head} {form % tuple(row)}\n" for row in rows.tolist())


def write_obj(asset: Textured, path: Path, up: str) -> list[Path]:
    """OBJ with MTL and PNG beside it; numbers count from one, and v runs upwards there."""
    material, picture = path.with_suffix(".mtl"), path.with_suffix(".png")
    corner = np.repeat(asset.mesh.faces + 1, 3, 1)
    text = [
        f"# limbeck; one unit is one metre; {up} is up\nmtllib {material.name}\no asset\n",
        lines("v", asset.mesh.vertices, "%.7g %.7g %.7g"),
        lines("vt", asset.uv * [1, -1] + [0, 1], "%.7g %.7g"),
        lines("vn", asset.normals, "%.6f %.6f %.6f"),
        "usemtl asset\n",
        lines("f", corner, "%d/%d/%d %d/%d/%d %d/%d/%d"),
    ]
    path.write_text("".join(text), encoding="utf-8")
    material.write_text(MATERIAL.format(picture=picture.name), encoding="utf-8")
    picture.write_bytes(png(asset.image))
    return [path, material, picture]


def write_ply(asset: Textured, path: Path) -> Path:
    """Binary PLY: welded vertices with normals and the texture's colours there (sRGB bytes)."""
    colour = np.round(asset.at(asset.uv)).astype(np.uint8)
    _, first, name = np.unique(asset.mesh.vertices, axis=0, return_index=True, return_inverse=True)
    count, faces = len(first), name.reshape(-1)[asset.mesh.faces]
    names = ["x", "y", "z", "nx", "ny", "nz"]
    vertex = np.zeros(count, [*((n, "<f4") for n in names), *((n, "u1") for n in ("red", "green", "blue"))])
    for i, values in enumerate([*asset.mesh.vertices[first].T, *asset.normals[first].T, *colour[first].T]):
        vertex[vertex.dtype.names[i]] = values  # type: ignore[index]
    face = np.zeros(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    face["count"], face["corners"] = 3, faces
    head = ["ply", "format binary_little_endian 1.0", "comment limbeck; one unit is one metre"]
    head += [f"element vertex {count}", *(f"property float {n}" for n in names)]
    head += [f"property uchar {n}" for n in ("red", "green", "blue")]
    head += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    path.write_bytes("\n".join(head).encode() + b"\n" + vertex.tobytes() + face.tobytes())
    return path


def write_usdz(asset: Textured, path: Path) -> Path:
    """USDZ (Pixar's USD, the extra `usd`) of an asset that is +Y up, with a preview material."""
    try:
        from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, UsdUtils, Vt
    except ImportError:
        raise BadInput("USDZ is written by usd-core: run `pip install 'limbeck[usd]'`") from None
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        picture, layer = Path(folder) / "asset.png", Path(folder) / "asset.usdc"
        Image.fromarray(asset.image).save(picture)
        stage = Usd.Stage.CreateNew(str(layer))
        UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
        UsdGeom.SetStageMetersPerUnit(stage, 1.0)
        mesh = UsdGeom.Mesh.Define(stage, "/asset/mesh")
        stage.SetDefaultPrim(UsdGeom.Xform.Define(stage, "/asset").GetPrim())
        low, high = asset.mesh.bounds.tolist()
        mesh.CreateExtentAttr([Gf.Vec3f(*low), Gf.Vec3f(*high)])
        mesh.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(asset.mesh.vertices.astype(np.float32)))
        mesh.CreateFaceVertexCountsAttr([3] * len(asset.mesh.faces))
        mesh.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(asset.mesh.faces.astype(np.int32).ravel()))
        mesh.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(asset.normals.astype(np.float32)))
        mesh.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
        mesh.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
        uv = UsdGeom.PrimvarsAPI(mesh).CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex)
        uv.Set(Vt.Vec2fArray.FromNumpy((asset.uv * [1, -1] + [0, 1]).astype(np.float32)))
        UsdShade.MaterialBindingAPI.Apply(mesh.GetPrim()).Bind(_material(stage, Sdf, UsdShade))
        stage.GetRootLayer().Save()
        if not UsdUtils.CreateNewUsdzPackage(Sdf.AssetPath(str(layer)), str(path)):
            raise BadInput(f"{path} could not be written as USDZ")
    return path


def _material(stage: object, sdf: object, shade: object) -> object:
    """A preview surface whose base colour is the picture beside the layer."""
    types, material = sdf.ValueTypeNames, shade.Material.Define(stage, "/asset/material")  # type: ignore[attr-defined]
    surface, reader, texture = (
        shade.Shader.Define(stage, f"/asset/material/{name}")  # type: ignore[attr-defined]
        for name in ("surface", "reader", "texture")
    )
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("metallic", types.Float).Set(0.0)
    surface.CreateInput("roughness", types.Float).Set(1.0)
    reader.CreateIdAttr("UsdPrimvarReader_float2")
    reader.CreateInput("varname", types.String).Set("st")
    texture.CreateIdAttr("UsdUVTexture")
    texture.CreateInput("file", types.Asset).Set("asset.png")
    texture.CreateInput("sourceColorSpace", types.Token).Set("sRGB")
    texture.CreateInput("st", types.Float2).ConnectToSource(reader.ConnectableAPI(), "result")
    texture.CreateOutput("rgb", types.Float3)
    surface.CreateInput("diffuseColor", types.Color3f).ConnectToSource(texture.ConnectableAPI(), "rgb")
    material.CreateSurfaceOutput().ConnectToSource(surface.ConnectableAPI(), "surface")
    return material
