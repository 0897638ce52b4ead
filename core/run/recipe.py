"""Recipes are data: strict models read from safe YAML, checked without torch; errors name the line."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic import create_model as _create_model
from pydantic_core import PydanticCustomError

from limbeck.core.run import yamlio
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.registry import registry
from limbeck.core.scheduled import Scheduled

Count = Annotated[int, Field(ge=1, le=10**9)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,63}){0,3}$")]
FLAGS = {
    "set", "out", "name", "prompts", "seed", "seeds", "device", "dry-run", "processes", "reward-program",
    "reward-address", "help",
}  # fmt: skip
Texts = dict[yamlio.Keys, str]
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,63}){0,15}\Z")
SLOTS = {"teacher": "teacher", "student": "student", "data": "data", "space": "space", "sampler": "sampler"}


REMEDIES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "too_short": "must have at least one item",
    "string_pattern_mismatch": "must be a name made of letters, digits, - and _ (with . or / between parts)",
}


class Strict(BaseModel):
    """The base of every configuration: unknown keys and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Piece(Strict):
    """A piece by its registry name; its other fields are those of the registered config class."""

    kind: str


def piece(kind: str, value: Any, extras: Mapping[str, Any]) -> BaseModel:
    """One piece, validated: an instance of its registered config class with `.kind` and the extras added."""
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise PydanticCustomError("own", "must be a mapping with kind: NAME (a {k})", {"k": kind})
    try:
        spec = registry().get(kind, value["kind"])
        model = _model(registry().config(spec), spec.name, tuple(extras.items()))
    except BadInput as error:
        raise PydanticCustomError("own", "{text}", {"text": str(error)}) from None
    try:
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise PydanticCustomError("piece", "piece", {"model": model, "errors": error.errors()}) from None


_models: dict[tuple[Any, str, Any], type[BaseModel]] = {}


def _model(config: type[BaseModel] | None, name: str, extras: tuple[tuple[str, Any], ...]) -> type[BaseModel]:
    """The config class, with `kind` (and `weight` for losses) added where it lacks them."""
    base = config or Strict
    key = (base, name, tuple(field for field, _ in extras))
    if key not in _models:
        added: dict[str, Any] = {k: v for k, v in (("kind", (str, name)), *extras) if k not in base.model_fields}
        _models[key] = _create_model(base.__name__, __base__=base, __module__=base.__module__, **added)
    return _models[key]


def _slot(kind: str, **extras: Any) -> PlainValidator:
    return PlainValidator(lambda value: piece(kind, value, extras))


def _maybe(kind: str) -> PlainValidator:
    return PlainValidator(lambda value: None if value is None else piece(kind, value, {}))


Weight = (Scheduled, 1.0)
Loss = Annotated[Any, _slot("objective", weight=Weight)]
Metric = Annotated[Any, _slot("metric")]
Reward = Annotated[Any, _slot("reward", weight=Weight)]
Sampler = Annotated[Any, _slot("sampler")]
Student = Annotated[Any, _slot("student")]
Teacher = Annotated[Any, _slot("teacher")]


class Expect(Strict):
    """What a run costs on two CPU cores, measured."""

    minutes: float = Field(ge=0)
    memory_gb: float = Field(ge=0)


Key = Annotated[str, Field(pattern="^" + KEY.pattern.replace(r"\Z", "$"))]


class Input(Strict):
    """An option of `limbeck run RECIPE`: the dotted key (or keys, all to the same value) it sets, and its help line."""

    set: Key | Annotated[list[Key], Field(min_length=1)]
    help: str = ""


class Rewards(Strict):
    """What is trained on, and what only judges."""

    train: list[Reward] = Field(min_length=1)
    held_out: list[Reward] = Field(min_length=1)


class Stage(Strict):
    """A stretch of training: who learns from what, and where it starts from."""

    name: Name
    steps: Count | None = None
    init_from: str | None = None
    data: Annotated[Any, _maybe("data")] = None  # of this stage alone (easier samples first); null: the recipe's
    losses: list[Loss] = Field(min_length=1)


class Checkpoint(Strict):
    """How often to save, and how many to keep."""

    every: Count = 100
    keep: Count = 3


class Log(Strict):
    """How often to write numbers."""

    every: Count = 10


class Pictures(Strict):
    """How often to draw samples, how many, and of which prompts."""

    every: Count = 100
    count: Annotated[int, Field(ge=1, le=4096)] = 16
    prompts: list[str] = []


class Distributed(Strict):
    """`shard: true` splits parameters over the processes (FSDP2)."""

    shard: bool = False


def _free(inputs: dict[str, Input]) -> dict[str, Input]:
    taken = sorted(FLAGS & inputs.keys())
    if taken:
        raise ValueError(f"the input {taken[0]} has the name of a flag of `limbeck run`; rename it")
    return inputs


def _unique(stages: list[Stage]) -> list[Stage]:
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError("two stages have the same name; rename one")
    return stages


class Row(Strict):
    """One recipe of a table, under a label, with `set:` lines of its own (KEY=VALUE)."""

    recipe: str
    label: Name
    set: list[str] = []
    caption: str = ""  # with it the row's last sheet stands on the table's contact sheet, else in a picture of its own


class Recipe(Strict):
    """Everything a run needs to know; `limbeck show RECIPE` prints it."""

    name: RecipeName
    about: str = ""
    paper: str = ""
    job: Literal["train", "sample", "table"] = "train"
    expect: Expect | None = None
    inputs: Annotated[dict[Name, Input], AfterValidator(_free)] = {}
    teacher: Annotated[Any, _maybe("teacher")] = None
    student: Annotated[Any, _maybe("student")] = None
    data: Annotated[Any, _maybe("data")] = None
    space: Annotated[Any, _maybe("space")] = None
    sampler: Annotated[Any, _maybe("sampler")] = None  # of `job: sample`; null: the model's own
    rewards: Rewards | None = None
    stages: Annotated[list[Stage], AfterValidator(_unique)] = []
    eval: list[Metric] = []
    rows: list[Row] = []  # of a table: each is carried out with this recipe's steps, batch and seed
    set: list[str] = []  # of a table: for every row
    steps: Count
    batch: Count
    accumulate: Count = 1  # parts in which a batch is taken, one after the other: less memory, the same gradient
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    sample: Pictures = Pictures()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    distributed: Distributed = Distributed()
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []

    @model_validator(mode="after")
    def _trains_something(self) -> "Recipe":
        if self.job == "train" and not self.stages:
            raise ValueError("job: train needs stages; add one with a name and losses")
        if self.batch % self.accumulate:
            raise ValueError(f"batch: {self.batch} is no multiple of accumulate: {self.accumulate}; change one of them")
        if (self.job == "table") != bool(self.rows):
            raise ValueError("job: table and rows: go together; give each row a recipe and a label")
        return self


def load(name_or_path: str, sets: Sequence[str] = (), inputs: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of this name or YAML file, with `--set` and input values applied, validated; BadInput otherwise."""
    document = source(name_or_path)
    texts = _apply(document, sets, inputs or {})
    return validate(document, texts)


def of(data: dict[str, Any], sets: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from plain data, as if it stood in a file."""
    document = yamlio.Document(data, where, {})
    return validate(document, _apply(document, sets, {}))


def names() -> list[str]:
    """Every recipe's name."""
    return sorted(registry().recipes)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal one."""
    return yamlio.dump(_kinds_first(recipe.model_dump(mode="json")))


def _kinds_first(data: Any) -> Any:
    """A piece is read by its kind first."""
    if isinstance(data, list):
        return [_kinds_first(item) for item in data]
    if not isinstance(data, dict):
        return data
    keys = sorted(data, key=lambda key: key != "kind")  # stable
    return {key: _kinds_first(data[key]) for key in keys}


def digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def source(name_or_path: str) -> yamlio.Document:
    """The raw recipe (its `extends:` already merged), not yet validated."""
    path, name = _locate(name_or_path)
    document = yamlio.parse(yamlio.read(path), str(path))
    _expect_mapping(document)
    base = document.data.pop("extends", None)
    if base is not None:
        document = _extend(document, base, path)
    document.data.setdefault("name", name)
    return document


def _locate(name_or_path: str) -> tuple[Path, str]:
    if not name_or_path.strip():
        raise BadInput("the recipe's name is empty; `limbeck list` shows the names")
    if name_or_path.endswith((".yaml", ".yml")) or name_or_path.startswith(("/", "./", "../", "~")):
        path = Path(name_or_path).expanduser() if name_or_path.startswith("~/") else Path(name_or_path)
        return path, re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-.")[:64] or "recipe"
    return registry().recipe(name_or_path), name_or_path


def _expect_mapping(document: yamlio.Document) -> None:
    if not isinstance(document.data, dict) or not document.data:
        raise BadInput(f"{clean(document.where)}:1: a recipe is a mapping of keys; write steps:, batch: and so on")


def _extend(document: yamlio.Document, base: Any, path: Path) -> yamlio.Document:
    where = f"{clean(document.where)}:{document.line(('extends',))}: extends"
    if not isinstance(base, str) or not base.strip():
        raise BadInput(f"{where}: must be one recipe name or a path relative to this file")
    parent = _base_path(base, path, where)
    try:
        below = yamlio.parse(yamlio.read(parent), str(parent))
        _expect_mapping(below)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if "extends" in below.data:
        raise BadInput(f"{where}: {clean(base, 80)} has an extends: of its own; name the recipe which that one extends")
    below.data.pop("name", None)
    return yamlio.Document(_merge(below.data, document.data), document.where, document.lines)


def _base_path(base: str, path: Path, where: str) -> Path:
    """A base is a recipe's name, or a file in this one's folder or below (for built-in recipes: in their tree)."""
    if not base.endswith((".yaml", ".yml")):
        try:
            return registry().recipe(base)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    try:
        found = (path.parent / base).resolve()
        roots = [path.parent.resolve(), *(p.parent.parent.resolve() for p in registry().recipes.values() if p == path)]
    except (OSError, ValueError, RuntimeError):
        raise BadInput(f"{where}: {clean(base, 80)} cannot be followed; name a file beside this one") from None
    if Path(base).is_absolute() or not any(found.is_relative_to(root) for root in roots):
        raise BadInput(f"{where}: {clean(base, 80)} lies outside this recipe's folder; copy it beside this file")
    return found


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key (a piece of another kind replaces the base's whole); all else is replaced."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over
    return {**base, **{key: _merge(base[key], value) if key in base else value for key, value in over.items()}}


def _apply(document: yamlio.Document, sets: Sequence[str], inputs: Mapping[str, str]) -> Texts:
    """Set the values in the raw recipe; what was typed is kept by path, for fields that turn out to hold text."""
    document.data = copy.deepcopy(document.data)
    known = document.data.get("inputs") or {}
    texts: Texts = {}
    for name, text in inputs.items():
        entry = known.get(name) if isinstance(known, dict) else None
        keys = keys_of(entry.get("set")) if isinstance(entry, dict) else []
        if not keys:
            raise BadInput(f"{clean(document.where)}: no input --{clean(name)}{did_you_mean(name, known)}")
        texts |= {_set(document, key, text, f"--{name}"): text for key in keys}
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise BadInput(f"--set {clean(item)}: write it as --set key.path=value")
        texts[_set(document, key.strip(), text, f"--set {clean(key, 80)}")] = text
    return texts


def keys_of(value: Any) -> list[str]:
    """The keys that an input sets, in a recipe not validated yet; none where it is no such thing."""
    listed = value if isinstance(value, list) else [value]
    return listed if all(isinstance(key, str) for key in listed) else []


def _set(document: yamlio.Document, key: str, text: str, where: str) -> yamlio.Keys:
    if not KEY.match(key) or key.split(".")[0] in ("extends", "inputs", "name"):
        raise BadInput(f"{where}: not a key that can be set; write a dotted key of the recipe such as log.every")
    parts = key.split(".")
    here: Any = document.data
    for i, part in enumerate(parts[:-1]):
        here = _step(here, part, parts[: i + 1], where)
    last = _index(here, parts[-1], where) if isinstance(here, list) else parts[-1]
    if not isinstance(here, dict | list):
        raise BadInput(f"{where}: {'.'.join(parts[:-1])} is a single value and has no keys; set it as a whole")
    value = _value(text, where)
    if last == "kind" and isinstance(value, str) and isinstance(here, dict) and value != here.get("kind"):
        _forget_foreign(here, parts, value)
    if isinstance(here, list) and last == len(here):
        here.append(None)
    here[last] = value
    return tuple(int(part) if part.isdigit() else part for part in parts)


def _step(here: Any, part: str, path: list[str], where: str) -> Any:
    if isinstance(here, dict):
        if here.get(part) is None:
            here[part] = {} if part != "prompts" else []
        return here[part]
    if isinstance(here, list):
        index = _index(here, part, where)
        if index == len(here):
            here.append({})
        return here[index]
    raise BadInput(f"{where}: {'.'.join(path[:-1])} is a single value and has no keys; set it as a whole")


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isascii() or not part.isdigit() or int(part[:6]) > len(items):
        raise BadInput(f'{where}: "{part}" must be a position 0..{len(items)} in a list of {len(items)}')
    return int(part)


def _value(text: str, where: str) -> Any:
    """A YAML scalar, `[list]` or `{mapping}`; any other text stands for itself."""
    try:
        value = yamlio.parse(text, where).data
    except BadInput:
        if text.lstrip()[:1] in tuple("[{&*!\"'") or "\0" in text:
            raise
        return text
    return text if isinstance(value, dict | list) and text.lstrip()[0] not in "[{" else value


def _forget_foreign(mapping: dict[str, Any], parts: list[str], name: str) -> None:
    """Changing a kind keeps the fields that both kinds have."""
    kind = _piece_kind(parts[:-1])
    spec = registry().specs.get((kind, name)) if kind else None
    if spec is None:
        return
    config = registry().config(spec)
    known = set(config.model_fields if config else ()) | {"kind", "weight"}
    for key in [key for key in mapping if key not in known]:
        del mapping[key]


def _piece_kind(parts: list[str]) -> str:
    match parts:
        case [slot] if slot in SLOTS:
            return SLOTS[slot]
        case ["stages", _, "data"]:
            return "data"
        case ["stages", _, "losses", _]:
            return "objective"
        case ["eval", _]:
            return "metric"
        case ["rewards", _, _]:
            return "reward"
    return ""


def validate(document: yamlio.Document, texts: Texts | None = None) -> Recipe:
    """The validated recipe; the first fault as a BadInput with file, line, key path and remedy."""
    try:
        return Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        faults = [fault for item in error.errors() for fault in _faults(item, Recipe)]
    typed = texts or {}
    wanted = {
        fault.path: typed[fault.path]
        for fault in faults
        if fault.error["type"] == "string_type" and fault.path in typed
    }
    if wanted:
        for path, text in wanted.items():
            _put(document.data, path, text)
        return validate(document, {path: text for path, text in typed.items() if path not in wanted})
    fault = min(faults, key=lambda fault: document.line(fault.path))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    key = clean(".".join(str(part) for part in fault.path), 120) or "recipe"
    fresh = fault.path not in document.lines and any(path[: len(fault.path)] == fault.path for path in typed)
    key += " (set on the command line)" if fault.path in typed or fresh else ""
    raise BadInput(
        f"{clean(document.where)}:{document.line(fault.path)}: {key}: {_message(fault.error, fault.model)}{more}"
    )


def _put(data: Any, path: yamlio.Keys, value: Any) -> None:
    for part in path[:-1]:
        data = data[part]
    data[path[-1]] = value


class _Fault(NamedTuple):
    path: yamlio.Keys
    error: Any
    model: type[BaseModel]


def _faults(error: Any, model: type[BaseModel], above: yamlio.Keys = ()) -> list[_Fault]:
    """One pydantic error as faults; a piece's error unfolds into those of its own model."""
    place = (*above, *error["loc"])
    if error["type"] == "piece":
        inner = error["ctx"]
        return [fault for item in inner["errors"] for fault in _faults(item, inner["model"], place)]
    return [_Fault(place, error, model)]


def _message(error: Any, model: type[BaseModel]) -> str:
    kind, value = error["type"], clean(error.get("input"), 60)
    if kind == "extra_forbidden":
        options = _options(model, error["loc"][:-1])
        return f"unknown key{did_you_mean(str(error['loc'][-1]), options)}; the keys here are {', '.join(options)}"
    if kind == "missing":
        return "missing; add this key"
    if kind == "own":
        return str(error["msg"])
    if kind in REMEDIES:
        return f"{REMEDIES[kind]}, but is {value}"
    text = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be").replace("Input", "it")
    return clean(f"{text}, but is {value}" if text.startswith("must be") else text, 300)


def _options(model: Any, loc: tuple[Any, ...]) -> list[str]:
    """The field names of the model that `loc` leads to (the model's own when it leads elsewhere)."""
    for part in loc:
        fields = getattr(model, "model_fields", {})
        model = _inner(fields[part].annotation) if part in fields else model
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]


def _inner(annotation: Any) -> Any:
    """The model class inside Optional, list, dict, Annotated or a union; the annotation itself when there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in reversed(get_args(annotation)):
        found = _inner(argument)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
