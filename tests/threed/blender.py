"""Run by Blender's Python: imports a GLB, writes what came of it as JSON, and pictures from three sides.

`python blender.py ASSET.glb FOLDER`; white light from everywhere, so that a pixel shows the colour of the surface.
"""

import json
import sys
from pathlib import Path

import bpy
from mathutils import Vector

SIDES = {"front": (0, -1, 0), "left": (1, 0, 0), "above": (0, 0, 1)}


def material(found: bpy.types.Material) -> dict[str, object]:
    """What its base colour comes from, and how rough and metallic it is."""
    surface = next(node for node in found.node_tree.nodes if node.bl_idname == "ShaderNodeBsdfPrincipled")
    (link,) = surface.inputs["Base Color"].links
    image = link.from_node.image
    return {
        "size": list(image.size),
        "space": image.colorspace_settings.name,
        "metallic": surface.inputs["Metallic"].default_value,
        "roughness": surface.inputs["Roughness"].default_value,
    }


def facts() -> dict[str, object]:
    """The one mesh in the world, with its material."""
    (mesh,) = (thing for thing in bpy.data.objects if thing.type == "MESH")
    corners = [mesh.matrix_world @ vertex.co for vertex in mesh.data.vertices]
    bounds = [[pick(corner[i] for corner in corners) for i in range(3)] for pick in (min, max)]
    (one,) = mesh.data.materials
    return {"bounds": bounds, "faces": len(mesh.data.polygons), "uv": len(mesh.data.uv_layers), **material(one)}


def pictures(folder: Path, middle: Vector) -> None:
    """A picture from each of SIDES, two units wide."""
    scene = bpy.context.scene
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.type, camera.data.ortho_scale = "ORTHO", 2.0
    scene.collection.objects.link(camera)
    scene.camera, scene.world = camera, bpy.data.worlds.new("white")
    scene.world.use_nodes = True
    scene.world.node_tree.nodes["Background"].inputs[0].default_value = (1, 1, 1, 1)
    scene.render.engine, scene.cycles.device, scene.cycles.samples = "CYCLES", "CPU", 8
    scene.render.resolution_x = scene.render.resolution_y = 32
    scene.view_settings.view_transform = "Standard"
    for name, side in SIDES.items():
        camera.location = middle + 5 * Vector(side)
        camera.rotation_euler = (-Vector(side)).to_track_quat("-Z", "Y").to_euler()
        scene.render.filepath = str(folder / f"{name}.png")
        bpy.ops.render.render(write_still=True)


def main(path: str, folder: Path) -> None:
    """The file into an empty world, then the facts and pictures."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=path)
    found = facts()
    (folder / "facts.json").write_text(json.dumps(found | {"blender": bpy.app.version_string}))
    low, high = (Vector(end) for end in found["bounds"])
    pictures(folder, (low + high) / 2)


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
