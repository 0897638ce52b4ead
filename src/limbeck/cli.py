"""The command line: what every verb takes. Each verb's work is imported when the verb runs, so `--help` is quick.

Exit status: 0 done, 1 the run failed, 2 bad input or recipe, 130/143 stopped by a signal with a checkpoint.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(name="limbeck", context_settings={"help_option_names": ["-h", "--help"]}, **PLAIN)
assets = typer.Typer(name="assets", help="Build embedded data (maintainers).", **PLAIN)
app.add_typer(assets)
UsageError = typer.BadParameter.__mro__[2]  # the base of all usage errors; typer carries its own copy of click

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is when left out.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the recipe: a.b=c.")
]
Processes = Annotated[
    int, typer.Option(min=1, help="Start this many processes (through torchrun); of several runs: so many at once.")
]
Programs = Annotated[
    list[str] | None,
    typer.Option("--reward-program", metavar="NAME=COMMAND", help="Your program behind the recipe's reward NAME."),
]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--reward-address", metavar="NAME=ADDRESS", help="A reward server elsewhere: http://HOST:PORT."),
]


@app.callback(invoke_without_command=True)
def face(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Distil big diffusion and reward models into small, fast or controllable things."""
    from limbeck import __version__

    if version or context.invoked_subcommand is None:
        print(__version__ if version else context.get_help())
        raise typer.Exit()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="The recipe's own inputs are options too: `limbeck run RECIPE --help` shows them.",
)
def run(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file.")] = None,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Where run folders go (runs/<recipe>).")] = None,
    name: Annotated[str | None, typer.Option(help="The run folder's name (the time).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all draws.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A run for each line's prompt; again: goes on with what is left."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs with so many seeds, counted up from --seed.")] = 1,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory and time that it would take, and stop.")
    ] = False,
    processes: Processes = 1,
    reward_program: Programs = None,
    reward_address: Addresses = None,
) -> None:
    """Carry out a recipe."""
    from limbeck import verbs

    extra = list(context.args)
    if recipe is None or recipe in ("-h", "--help") or {"-h", "--help"} & set(extra):
        print(context.get_help())
        if recipe and not recipe.startswith("-"):
            print("\n" + verbs.inputs_help(recipe))
        raise typer.Exit()
    outside = (list(reward_program or []), list(reward_address or []))
    order = verbs.Order(
        recipe, extra, list(sets or []), out, name, seed, device, dry_run, processes, *outside, prompts, seeds
    )
    raise typer.Exit(verbs.run(order, [parameter.opts[0] for parameter in context.command.params[1:]]))


@app.command("list")
def list_(
    pieces: Annotated[bool, typer.Option("--pieces", help="List the pieces that recipes may name, by kind.")] = False,
) -> None:
    """List the recipes."""
    from limbeck import verbs

    verbs.list_pieces() if pieces else verbs.list_recipes()


@app.command()
def show(recipe: Annotated[str, typer.Argument(metavar="RECIPE")], sets: Sets = None) -> None:
    """Show what a recipe does, its inputs, defaults and cost."""
    from limbeck import verbs

    verbs.show(recipe, list(sets or []))


@app.command()
def runs(out: Annotated[Path, typer.Option(help="Where to look.")] = Path("runs")) -> None:
    """List the runs."""
    from limbeck import verbs

    verbs.list_runs(out)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN")], second: Annotated[Path, typer.Argument(metavar="RUN")]
) -> None:
    """Show two runs side by side: recipes, numbers, evaluations."""
    from limbeck import verbs

    verbs.compare(first, second)


@app.command()
def resume(
    run: Run,
    device: Device = None,
    processes: Processes = 1,
    reward_program: Programs = None,
    reward_address: Addresses = None,
) -> None:
    """Go on with a run from its last checkpoint."""
    from limbeck import verbs

    raise typer.Exit(verbs.resume(run, device, processes, reward_program or [], reward_address or []))


@app.command()
def sample(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option(help="What to sample; may be given several times.")] = None,
    which: Annotated[
        str | None, typer.Option(metavar="student|teacher", help="Which model samples (the one that was trained).")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the samples (RUN/samples/prompts).")] = None,
    device: Device = None,
) -> None:
    """Sample from a run's student (or its teacher)."""
    from limbeck import verbs

    verbs.sample(run, list(prompt or []), which, steps, guidance, seed, out, device)


@app.command("eval")
def eval_(run: Run, device: Device = None, reward_program: Programs = None, reward_address: Addresses = None) -> None:
    """Measure a run with its recipe's metrics."""
    from limbeck import verbs

    verbs.evaluate(run, device, reward_program or [], reward_address or [])


@app.command()
def export(
    run: Run,
    format: Annotated[str, typer.Option(help="One of the formats that the run's domain writes.")],
    out: Annotated[Path | None, typer.Option(help="Where to write (RUN/exports/FORMAT).")] = None,
    device: Device = None,
) -> None:
    """Write a run's student in a format other programs read."""
    from limbeck import verbs

    verbs.export(run, format, out, device)


@app.command()
def view(
    run: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0 takes a free one.")] = 8766,
) -> None:
    """Show a run in a browser, also while it runs: turn assets, compare steps, see clips and numbers."""
    from limbeck import verbs

    verbs.view(run, port)


@app.command()
def verify(
    methods: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]...", help="All, when none is named.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Check the methods against answers that are known exactly."""
    from limbeck.core.run.checks import run_checks

    raise typer.Exit(run_checks(list(methods or []), json, sys.stdout))


@app.command("reward-server")
def reward_server(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward; `limbeck list --pieces` shows them.")],
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One of its settings.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    device: Device = None,
) -> None:
    """Serve a reward over HTTP, for runs in other environments (`kind: remote`)."""
    from limbeck import verbs

    verbs.serve_reward(name, list(sets or []), host, port, device)


@assets.command("build")
def build(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Build one of the embedded data sets from its sources."""
    from limbeck import verbs

    verbs.build_asset(name)


@app.command()
def doctor() -> None:
    """Check this machine and what is installed on it."""
    from limbeck.doctor import examine

    raise typer.Exit(examine())


@app.command()
def plugins() -> None:
    """List the plugins, what each brings and any problems."""
    from limbeck import verbs

    verbs.list_plugins()


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    out: Annotated[Path, typer.Option(help="Folder that gets the package's folder.")] = Path("."),
) -> None:
    """Write a working plugin package with its test."""
    from limbeck.scaffold import write

    print(write(name, out))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a verb; errors a user can act on are one line on stderr."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # they would scan every package, broken ones too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait halve a shared machine
    try:
        code = app(args=arguments, prog_name="limbeck", standalone_mode=False) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (KeyboardInterrupt, typer.Abort):
        code = _say("stopped", 130)
    except Exception as error:
        code = _explain(error)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # all is written; gloo's threads may abort an interpreter's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _explain(error: Exception) -> int:
    """One line and the exit status for errors we know; any other error is a bug and keeps its traceback."""
    from limbeck.core.run.errors import LimbeckError, clean

    if isinstance(error, LimbeckError):
        return _say(str(error), error.code)
    if isinstance(error, UsageError):
        return _say(f"{clean(error.format_message(), 400)} Try `limbeck --help`.", 2)  # type: ignore[attr-defined]
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("limbeck"):
        from limbeck.doctor import extra_of

        return _say(f'needs the package "{error.name}"; install it with pip install "{extra_of(error.name)}"', 2)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return _say(f"{clean(error.filename)}: {error.strerror}; check the path, its permissions and the free space", 1)
    raise error


def _say(message: str, code: int) -> int:
    print("limbeck: " + " ".join(message.split()), file=sys.stderr)
    return code
