"""One recipe carried out in one folder: build, estimate, train the stages, sample, evaluate, report; and resume."""

import contextlib
import errno
import functools
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.core.run import checkpoint, memory, outside, table
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.checkpoint import Loaded, Manifest
from limbeck.core.run.config import StudentOf
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput, LimbeckError, NonFinite
from limbeck.core.run.metrics import Metrics
from limbeck.core.run.players import Objective
from limbeck.core.run.recipe import Recipe, Stage
from limbeck.core.run.trainer import Cadence, Stopped, Trainer

Rows = list[dict[str, Any]]


def run(
    recipe: Recipe,
    folder: Path,
    *,
    device: str | None = None,
    dry_run: bool = False,
    resume: bool = False,
    quiet: bool = False,
    at_once: int = 1,
) -> int:
    """Carry a recipe out (or go on with it); the exit status. LimbeckError after the report when it fails.

    `at_once`: of a table, how many of its rows, each in a process of its own where there are several.
    """
    team = Team(device, recipe.precision, recipe.distributed.shard)
    baseline = memory.now(team.device)
    build = Build(recipe, team.device, folder, team.rank, team.size)
    if not dry_run:
        _open_folder(build, team, resume)
    with Metrics(folder, team.device, quiet=quiet, writes=team.rank == 0) as metrics:
        job = Job(build, team, metrics, baseline, at_once, device)
        try:
            with _explained(recipe):
                return job.estimate_all() if dry_run else job.carry_out(resume)
        except Stopped as stop:
            metrics.stop_live()
            metrics.say(f"{stop}: a checkpoint is written; go on with `limbeck resume {folder}`")
            return stop.code
        except LimbeckError as error:
            metrics.stop_live()
            _record(folder, error, dry_run or team.rank > 0)
            raise
        finally:
            metrics.stop_live()
            if not dry_run and team.rank == 0:
                _report(folder, metrics)


def open_run(folder: Path, device: str | None = None) -> Build:
    """A run's pieces with the weights of its newest checkpoint (the EMA where there is one)."""
    recipe = recipes.load(str(folder / "recipe.yaml"))
    build = Build(recipe, Team(device).device, folder)
    loaded = checkpoint.result(folder / "checkpoints", lambda line: print(line, file=sys.stderr))
    if loaded is None and recipe.job == "train":
        raise BadInput(f"{folder} has no checkpoint yet; let it run or `limbeck resume` it")
    if loaded is not None:
        load_weights(build.objective(loaded.manifest.stage), loaded)
        build.step = loaded.manifest.step
    return build


def student_of(config: StudentOf, build: Build) -> Any:
    """Factory of the student `run`: the student of another run, with the weights that it ended with."""
    if not (Path(config.of) / "recipe.yaml").is_file():
        raise BadInput(f"student.of: {config.of} is no run folder; train a student first and name its folder")
    return open_run(Path(config.of), str(build.device)).piece("student")


def evaluate(build: Build) -> dict[str, Rows]:
    """Every metric of the recipe, as tables; kept in eval.json."""
    tables: dict[str, Rows] = {}
    for i, config in enumerate(build.recipe.eval):
        name = config.kind if config.kind not in tables else f"{config.kind}.{i}"
        tables[name] = build.piece(f"eval.{i}")()
    if tables and build.rank == 0:
        (build.folder / "eval.json").write_text(json.dumps(tables, indent=1))
    return tables


def load_weights(objective: Objective, loaded: Loaded) -> None:
    """Players start from the weights (EMA where there is one) of the players of the same name in a checkpoint."""
    known = 0
    for name, player in objective.players.items():
        weights: dict[str, Any] = {}
        for part in ("param", "ema"):
            prefix = f"player/{name}/{part}/"
            weights |= {key[len(prefix) :]: t for key, t in loaded.tensors.items() if key.startswith(prefix)}
        if weights:
            player.load_weights(weights)
            player.bind(player.params)  # a fresh EMA, from these weights
            known += 1
    if not known:
        raise BadInput(f"no player of stage {loaded.manifest.stage} has the name of one of {sorted(objective.players)}")


@dataclass
class Job:
    """The stages of one run."""

    build: Build
    team: Team
    metrics: Metrics
    baseline: int
    at_once: int = 1
    named: str | None = None  # the device that the command line named

    def __post_init__(self) -> None:
        self.recipe = self.build.recipe
        self.checkpoints = self.build.folder / "checkpoints"

    def estimate_all(self) -> int:
        """What `--dry-run` shows: each stage's memory and time (for a table: row by row), and nothing left behind."""
        for row in self.recipe.rows:
            self.metrics.say(f"{row.label} ({row.recipe}):")
            inner = table.recipe_of(self.recipe, row)
            run(inner, self.build.folder, device=str(self.team.device), dry_run=True, quiet=self.metrics.quiet)
        for stage in self.recipe.stages:
            self.estimate(stage)
        return 0

    def carry_out(self, resume: bool) -> int:
        """Train what is left of the stages, then sample and evaluate."""
        self.metrics.track(self.recipe.track, {"recipe": self.recipe.name, "seed": self.recipe.seed})
        if self.recipe.job == "train":
            self._train_all(resume)
        elif self.recipe.job == "sample":
            self._sample()
        elif self.at_once > 1:
            table.carry_out_apart(self.recipe, self.build.folder, self.at_once, self._device, self.metrics.say)
        else:
            row = functools.partial(run, device=str(self.team.device), quiet=self.metrics.quiet)
            table.carry_out(self.recipe, self.build.folder, row, self.metrics.say)
        if self.recipe.eval and (self.team.rank == 0 or self.team.shard):  # sharded weights need all processes
            self._evaluate()
        self.team.barrier()
        self.metrics.say(f"done: {self.build.folder}")
        return 0

    def _device(self, place: int) -> str:
        """What the place-th of several processes computes on: GPUs in turn, where none was named."""
        if self.named or self.team.device.type != "cuda":
            return str(self.team.device)
        return f"cuda:{place % torch.cuda.device_count()}"

    def estimate(self, stage: Stage) -> None:
        """Print memory and time of one stage from three steps of a copy that is thrown away."""
        trainer = self._trainer(stage)
        with contextlib.suppress(NonFinite):  # the run itself will tell, at the step where it happens
            self.metrics.say(f"{stage.name}: {memory.measure(trainer, self.baseline)}")
        del trainer
        self.build.forget()
        memory.release()

    def _train_all(self, resume: bool) -> None:
        if self.team.rank == 0:
            checkpoint.sweep(self.checkpoints)
        self.team.barrier()
        loaded = checkpoint.latest(self.checkpoints, self.metrics.say) if resume else None
        if resume and loaded is None:
            self.metrics.say("there is no checkpoint yet; the run starts from its beginning")
        names = [stage.name for stage in self.recipe.stages]
        if loaded and loaded.manifest.stage not in names:
            raise BadInput(f"the checkpoint is of stage {loaded.manifest.stage}, which recipe.yaml lacks; restore it")
        first = names.index(loaded.manifest.stage) if loaded else 0
        for i, stage in enumerate(self.recipe.stages[first:], first):
            trainer = self._train(stage, i, loaded if i == first else None)
        self.ending = trainer

    def _train(self, stage: Stage, index: int, loaded: Loaded | None) -> Trainer:
        if loaded is None:
            self.build.forget()
            self.estimate(stage)
        trainer = self._trainer(stage, start=loaded is None)
        trainer.cadence = self._cadence(index)
        if loaded:
            trainer.load(loaded.tensors, loaded.manifest.step, loaded.manifest.pending)
            trainer.ended = loaded.manifest.ended
            self.metrics.say(f"{stage.name}: going on after step {trainer.step}")
        if trainer.step == 0:
            trainer.cadence.sample(trainer)
        earlier = [s.name for s in self.recipe.stages[:index]]
        self.metrics.begin(stage.name, trainer.step, trainer.steps, earlier)
        trainer.run()
        self.metrics.stop_live()
        if trainer.ended:
            self._settle(trainer)
        return trainer

    def _settle(self, trainer: Trainer) -> None:
        """A stage that was ended early: say why, and go on from its best checkpoint."""
        best = checkpoint.result(self.checkpoints, self.metrics.say, trainer.stage)
        assert best is not None
        trainer.load(best.tensors, trainer.step, {})
        at = f"step {trainer.step}; the weights are those of step {best.manifest.step}"
        self.metrics.say(f"{trainer.stage}: ended early at {at}: {trainer.ended}")

    def _trainer(self, stage: Stage, start: bool = False) -> Trainer:
        objective = self.build.objective(stage)
        if start and stage.init_from:
            load_weights(objective, self._origin(stage.init_from))
        r = self.recipe
        return Trainer(
            objective, self.team, r.seed, stage.name, self.build.total_steps(stage), r.batch, parts=r.accumulate
        )

    def _origin(self, source: str) -> Loaded:
        """The end of an earlier stage, or the newest checkpoint of another run's folder."""
        if source in [stage.name for stage in self.recipe.stages]:
            loaded = checkpoint.result(self.checkpoints, self.metrics.say, source)
        else:
            loaded = checkpoint.result(Path(source) / "checkpoints", self.metrics.say)
        if loaded is None:
            raise BadInput(f"init_from: {source} is neither an earlier stage nor a run folder with a checkpoint")
        return loaded

    def _cadence(self, index: int) -> Cadence:
        r = self.recipe
        save = functools.partial(self._save, index)
        return Cadence(r.log.every, self.metrics.row, r.checkpoint.every, save, r.sample.every, self._show)

    def _save(self, index: int, trainer: Trainer) -> None:
        pending = trainer.settled()
        manifest = Manifest(
            trainer.stage, trainer.step, recipes.digest(self.recipe), index, trainer.held_out, trainer.ended, pending
        )  # fmt: skip
        checkpoint.save(self.checkpoints, trainer.state(), manifest, self.recipe.checkpoint.keep, self.team.rank == 0)
        self.team.barrier()

    def _show(self, trainer: Trainer) -> None:
        """Sample pictures with the EMA weights; every process takes part only when the weights are sharded."""
        if not self.build.has("space") or (self.team.rank and not self.team.shard):
            return
        folder = self.build.folder / "samples"
        if self.team.rank:
            folder = folder / f".rank-{self.team.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        with _averaged(trainer.objective), torch.no_grad():
            self.build.piece("space").show(self.build, trainer.step, folder)

    def _sample(self) -> None:
        if self.team.rank:
            return
        r, space, folder = self.recipe, self.build.piece("space"), self.build.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        if self.build.has("sampler"):
            drawn = self.build.piece("sampler")(list(r.sample.prompts), r.seed)
            space.keep(self.build, drawn.x, list(r.sample.prompts), r.seed, folder)
        else:
            which = "student" if self.build.has("student") else "teacher"
            space.sample(self.build, r.sample.prompts, r.seed, folder, which=which)

    def _evaluate(self) -> None:
        trained = getattr(self, "ending", None)
        self.metrics.say("evaluating")
        self.build.note = self.metrics.progress
        with _averaged(trained.objective) if trained else contextlib.nullcontext():
            evaluate(self.build)


@contextlib.contextmanager
def _averaged(objective: Objective) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for player in objective.players.values():
            stack.enter_context(player.ema_weights())
        yield


@contextlib.contextmanager
def _explained(recipe: Recipe) -> Iterator[None]:
    """Out of memory and a disk that refuses become one line that says what to change."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG):
            raise
        raise LimbeckError(f"{error.filename or 'the run folder'}: cannot be written ({error.strerror})") from None
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        raise memory.advice(recipe, "in this run") from None


def _open_folder(build: Build, team: Team, resume: bool) -> None:
    folder = build.folder
    if team.rank == 0:
        try:
            if not resume and folder.is_dir() and any(folder.iterdir()):
                raise BadInput(f"{folder} is not empty; choose another --name, or `limbeck resume {folder}`")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").unlink(missing_ok=True)
            if not resume:
                (folder / "recipe.yaml").write_text(recipes.dump(build.recipe))
            if not (folder / "environment.json").exists():  # a row of a table begins as a resume
                (folder / "environment.json").write_text(json.dumps(environment(build), indent=1))
        except OSError as error:
            raise BadInput(f"{folder}: cannot write there ({error.strerror}); choose another --out") from None
    team.barrier()


def environment(build: Build) -> dict[str, Any]:
    """What somebody needs to repeat the run."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    typed = Path(sys.argv[0]).name in ("limbeck", "__main__.py")
    return {
        "limbeck": version("limbeck"),
        "command": shlex.join(["limbeck", *outside.hidden(sys.argv[1:])]) if typed else "",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "recipe": build.recipe.name,
        "digest": recipes.digest(build.recipe),
        "seed": build.seed,
        "device": torch.cuda.get_device_name() if build.device.type == "cuda" else str(build.device),
        "processes": build.world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def _record(folder: Path, error: LimbeckError, skip: bool) -> None:
    """The error for the report and the log; the command line prints it."""
    with contextlib.suppress(OSError):
        if not skip:
            (folder / "error.txt").write_text(f"{error}\n")
            with (folder / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {error}\n")


def _report(folder: Path, metrics: Metrics) -> None:
    """The report, also of a failed run; a report that fails must not hide why the run did."""
    from limbeck.core.run import report

    try:
        metrics.say(f"report: {report.write(folder)}")
    except Exception as error:
        metrics.say(f"the report could not be written ({type(error).__name__}: {error})")
