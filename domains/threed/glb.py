"""Binary glTF 2.0 (Khronos): one mesh with its texture inside, +Y up, the front at +Z, in metres.

Written here rather than by trimesh so that the file holds exactly what artists' tools agree on, byte for byte the same
each time. Every block of the file begins at a multiple of four bytes.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limbeck.domains.threed.bake import Textured

FLOAT, INDEX = 5126, 5125  # float32, uint32
VERTICES, CORNERS = 34962, 34963
LINEAR, MIPMAPS, CLAMP = 9729, 9987, 33071


def png(image: np.ndarray) -> bytes:
    """A picture uint8 [H,W,3] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def parts(asset: Textured) -> dict[str, np.ndarray]:
    """What is said of each vertex, by glTF's names; frames where there is a map of normals."""
    found = {"POSITION": asset.mesh.vertices, "NORMAL": asset.normals, "TEXCOORD_0": asset.uv}
    frames = {} if asset.relief is None else {"TANGENT": asset.tangents}
    return {name: values.astype("<f4") for name, values in {**found, **frames}.items()}


def write(asset: Textured, path: Path, name: str = "asset") -> Path:
    """Writes an asset that stands as glTF has it (+Y up)."""
    each, images = parts(asset), [asset.image] + ([] if asset.relief is None else [asset.relief])
    blocks = [*(values.tobytes() for values in each.values()), asset.mesh.faces.astype("<u4").tobytes()]
    targets = [{"target": VERTICES}] * len(each) + [{"target": CORNERS}] + [{}] * len(images)
    blocks += [png(image) for image in images]
    views, offset = [], 0
    for block, target in zip(blocks, targets, strict=True):
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(block), **target})
        offset += len(block) + -len(block) % 4
    body = b"".join(block + b"\0" * (-len(block) % 4) for block in blocks)
    said = header(each, asset.mesh.faces.size, views, len(body), name)
    head = json.dumps(said, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 4)
    chunks = struct.pack("<II", len(head), 0x4E4F534A) + head + struct.pack("<II", len(body), 0x004E4942) + body
    path.write_bytes(struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks)
    return path


def header(
    each: dict[str, np.ndarray], corners: int, views: list[dict[str, int]], size: int, name: str
) -> dict[str, Any]:
    """The JSON of a file whose body of `size` bytes holds `each` of the vertices, the corners, and pictures."""
    bounds = {"min": each["POSITION"].min(0).tolist(), "max": each["POSITION"].max(0).tolist()}
    kinds = [(f"VEC{values.shape[1]}", FLOAT, len(values)) for values in each.values()]
    kinds.append(("SCALAR", INDEX, corners))
    accessors: list[dict[str, Any]] = [
        {"bufferView": i, "type": kind, "componentType": number, "count": n}
        for i, (kind, number, n) in enumerate(kinds)
    ]
    accessors[0] |= bounds
    pictures = range(len(kinds), len(views))
    names = [name, f"{name} normals"]
    surface: dict[str, Any] = {"baseColorTexture": {"index": 0}, "metallicFactor": 0.0, "roughnessFactor": 1.0}
    bumps = {"normalTexture": {"index": 1}} if len(pictures) > 1 else {}
    primitive = {"attributes": {key: i for i, key in enumerate(each)}, "indices": len(each), "material": 0, "mode": 4}
    return {
        "asset": {"version": "2.0", "generator": "limbeck"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "materials": [{"name": name, "pbrMetallicRoughness": surface, **bumps, "doubleSided": False}],
        "textures": [{"sampler": 0, "source": i} for i in range(len(pictures))],
        "samplers": [{"magFilter": LINEAR, "minFilter": MIPMAPS, "wrapS": CLAMP, "wrapT": CLAMP}],
        "images": [
            {"name": what, "bufferView": view, "mimeType": "image/png"}
            for what, view in zip(names, pictures, strict=False)
        ],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": size}],
    }
