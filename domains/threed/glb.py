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
    """An sRGB picture uint8 [H,W,3] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(asset: Textured, path: Path, name: str = "asset") -> Path:
    """Writes an asset that stands as glTF has it (+Y up)."""
    mesh = asset.mesh
    blocks = [
        mesh.vertices.astype("<f4").tobytes(),
        asset.normals.astype("<f4").tobytes(),
        asset.uv.astype("<f4").tobytes(),
        mesh.faces.astype("<u4").tobytes(),
        png(asset.image),
    ]
    views, offset = [], 0
    for i, block in enumerate(blocks):
        target = {} if i == 4 else {"target": CORNERS if i == 3 else VERTICES}
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(block), **target})
        offset += len(block) + -len(block) % 4
    body = b"".join(block + b"\0" * (-len(block) % 4) for block in blocks)
    head = json.dumps(header(asset, views, len(body), name), separators=(",", ":")).encode()
    head += b" " * (-len(head) % 4)
    chunks = struct.pack("<II", len(head), 0x4E4F534A) + head + struct.pack("<II", len(body), 0x004E4942) + body
    path.write_bytes(struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks)
    return path


def header(asset: Textured, views: list[dict[str, int]], size: int, name: str) -> dict[str, Any]:
    """The JSON of a file whose body of `size` bytes holds vertices, normals, uv, corners and picture, in this order."""
    vertices, count = asset.mesh.vertices.astype(np.float32), len(asset.mesh.vertices)
    bounds = {"min": vertices.min(0).tolist(), "max": vertices.max(0).tolist()}
    kinds = [("VEC3", FLOAT, count), ("VEC3", FLOAT, count), ("VEC2", FLOAT, count)]
    kinds.append(("SCALAR", INDEX, asset.mesh.faces.size))
    accessors: list[dict[str, Any]] = [
        {"bufferView": i, "type": kind, "componentType": number, "count": n}
        for i, (kind, number, n) in enumerate(kinds)
    ]
    accessors[0] |= bounds
    surface = {"baseColorTexture": {"index": 0}, "metallicFactor": 0.0, "roughnessFactor": 1.0}
    attributes = {"POSITION": 0, "NORMAL": 1, "TEXCOORD_0": 2}
    return {
        "asset": {"version": "2.0", "generator": "limbeck"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"name": name, "primitives": [{"attributes": attributes, "indices": 3, "material": 0, "mode": 4}]}],
        "materials": [{"name": name, "pbrMetallicRoughness": surface, "doubleSided": False}],
        "textures": [{"sampler": 0, "source": 0}],
        "samplers": [{"magFilter": LINEAR, "minFilter": MIPMAPS, "wrapS": CLAMP, "wrapT": CLAMP}],
        "images": [{"name": name, "bufferView": 4, "mimeType": "image/png"}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": size}],
    }
