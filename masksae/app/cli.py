"""The command `masksae`: thin over the public functions.

Exit status: 0 done, 2 bad input or a place that cannot be written, said in one line on stderr, 130 interrupted. What was asked for goes to
stdout, as text or with --json as one JSON value; progress and messages go to stderr.
"""

import argparse
import contextlib
import errno
import html
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path

from masksae.errors import MasksaeError, nearest, require

DEFAULT = "laptop"

EPILOG = """A PROFILE fixes model, block, text, arms and SAEs. It is a shipped name
({names})
or the path of a YAML file. Downloads and scratch go to ~/.cache/masksae, or
MASKSAE_CACHE. Killed commands go on where they were. `masksae COMMAND --help`
has examples."""

EXAMPLES = {
    "fetch": "masksae fetch laptop",
    "plan": "masksae plan paper\nmasksae plan mine.yaml --measure",
    "train": "masksae train smoke                 three minutes on two CPU cores\n"
    "masksae train mine.yaml             a model of your own: a profile of 15 lines\n"
    "masksae train mine.yaml --json | jq -r .[].folder",
    "evaluate": "masksae evaluate MY_SAE --metrics absorption,contexts\n"
    "masksae evaluate MY_SAE --profile mine.yaml --json | jq keys",
    "explore": "masksae explore MY_SAE --letter s\nmasksae explore MY_SAE --context the --profile mine.yaml",
    "export": "masksae export MY_SAE OUT --to saelens",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that masksae raises on purpose are one line on stderr unless --debug asks for the traceback."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    return exit_status(lambda: _run(parser().parse_args(arguments)), debug)


def _run(options) -> None:
    options.run(options)


class Stopped(KeyboardInterrupt):
    """A signal that asks to end: the same way out as Ctrl-C, with a status of its own."""

    def __init__(self, number: int):
        self.status = 128 + number


def exit_status(work, debug: bool = False) -> int:
    """Do `work()` as a command does it, and give its exit status: what goes wrong on purpose is one line on stderr."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without our dashes and arrows
    try:
        with stopped_by_signals():
            status = work() or 0
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()
            return status
    except MasksaeError as error:
        if debug:
            raise
        print(f"masksae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("masksae: interrupted; what was finished is kept, and the same command goes on.", file=sys.stderr)
        return getattr(stop, "status", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if debug or error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print("masksae: the disk is full. Free some space; what was finished is kept.", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Python would try once more on its way out, and complain."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stopped_by_signals():
    """SIGTERM and SIGHUP raise Stopped inside, so that the way out ends children; one that is ignored (nohup) stays ignored."""

    def stop(number, _):
        raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parser() -> argparse.ArgumentParser:
    """All commands."""
    import masksae
    from masksae.files import shipped_profiles

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="masksae", description="Train, score and look at sparse autoencoders, with and without masked tokens.",
        epilog=EPILOG.format(names=", ".join(shipped_profiles())), formatter_class=raw,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"masksae {masksae.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, run, *, profile: bool = False):
        shown = "examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name].splitlines())
        command = commands.add_parser(name, help=text, description=text, epilog=shown, formatter_class=raw)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if profile:
            command.add_argument("profile", nargs="?", default=DEFAULT, help=f"name or YAML file (default: {DEFAULT})")
        return command

    add(
        "fetch",
        "Get and check a profile's model and text; later commands need no network.",
        fetch,
        profile=True,
    )
    plan = add("plan", "What a profile costs: work, hours, memory, disk. Needs no network.", print_plan, profile=True)
    plan.add_argument("--measure", action="store_true", help="time a fraction of the work here, too: a minute")
    add("train", "Train the SAEs of a profile, or go on with them.", train, profile=True)
    _add_evaluate(add)
    explore = add(
        "explore", "One parent of an SAE: what it fires on, what it misses, who absorbed that. HTML.", explore_sae
    )
    _own_sae(explore)
    parent = explore.add_mutually_exclusive_group(required=True)
    parent.add_argument("--letter", type=_letter, help='the parent "starts with LETTER"')
    parent.add_argument("--context", help='the parent "follows CONTEXT", such as the')
    export = add("export", "Write an SAE in another form.", export_sae)
    export.add_argument("sae", help="folder of one SAE (SAELens, dictionary_learning or masksae)")
    export.add_argument("out", help="folder to write")
    export.add_argument("--to", choices=("saelens", "dictionary_learning", "masksae"), required=True)
    return top


def _add_evaluate(add) -> None:
    evaluate = add(
        "evaluate",
        "Score an SAE with a profile's model, text and tasks; writes report.html.",
        evaluate_sae,
    )
    _own_sae(evaluate)
    evaluate.add_argument(
        "--metrics", type=_metrics, default="reconstruction,absorption,contexts",
        help="comma-separated, of reconstruction, absorption, contexts, probing, ood, perturbation (default: the first three)",
    )  # fmt: skip
    evaluate.add_argument("--l0", type=_l0, help="clean L0 of the matched scores (default: the SAE's own k or L0)")


def _l0(text: str) -> float:
    """Argument type: how many latents are active on a token, on average."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no mean number of active latents; give one above 0, such as 20")


def _letter(text: str) -> str:
    """Argument type: one letter from a to z."""
    if len(text) == 1 and text.isascii() and text.isalpha():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no letter from a to z")


def _metrics(text: str) -> list[str]:
    """Argument type: names of metrics, each once."""
    from masksae.study.own_sae import METRICS

    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"there is no metric {name!r}.{nearest(name, METRICS)}")
    return names


def _own_sae(command) -> None:
    command.add_argument("sae", help="folder of one SAE (SAELens, dictionary_learning or masksae)")
    command.add_argument("--profile", default=DEFAULT, help=f"whose model, block, text and tasks (default: {DEFAULT})")
    command.add_argument("--out", default="masksae-report", help="folder for what is written (default: masksae-report)")


def _show(options, value, text: str) -> None:
    print(json.dumps(value, indent=1) if options.json else text)


def fetch(options) -> None:
    """Model, text blocks and tasks of a profile, into the user's cache."""
    from masksae.app.repro import ask_for_terms
    from masksae.study.run import Run

    run = Run(options.profile)
    ask_for_terms(run.profile.model.source)
    sizes = {split: len(blocks) for split, blocks in run.blocks.items()}
    words = ", ".join(f"{n:,} blocks of {split}" for split, n in sizes.items())
    _show(
        options,
        {"profile": run.profile.name, "blocks": sizes},
        f"{run.profile.name}: model and text are there ({words})",
    )


def print_plan(options) -> None:
    """The cost of a profile."""
    from masksae.app import plan_text
    from masksae.app.repro import planned

    given = planned(options.profile, options.measure)
    _show(options, plan_text.record(*given), plan_text.text(*given))


def train(options) -> None:
    """SAEs of a profile; where each is, and how well it did in training."""
    from masksae.app.repro import ask_for_terms
    from masksae.study.report.tables import number, to_text
    from masksae.study.run import Run

    run = Run(options.profile)
    ask_for_terms(run.profile.model.source)
    trained, cells = [], [["in training", "EV", "L0"]]
    for name, sae in run.saes.items():
        folder = next((run.build / "saes").glob(f"*/{name}"))
        last = {key: sae.history[-1][key] for key in ("explained_variance", "l0")}
        trained.append({"sae": name, "folder": str(folder), **last})
        cells.append([name, number(last["explained_variance"]), number(last["l0"], 1)])  # no EV in batches of one token
    next_step = shlex.join(["masksae", "evaluate", trained[-1]["folder"], "--profile", options.profile])
    _show(options, trained, f"{to_text(cells)}\n\n{run.build / 'saes'}\n\nNext: {next_step}")


def evaluate_sae(options) -> None:
    """Scores of an SAE as a table or JSON, SAEBench files, and a page."""
    require("evaluate", "matplotlib", "seaborn", "zstandard")
    from masksae import progress
    from masksae.study import own_sae
    from masksae.study.report import own_sae as report
    from masksae.study.report import saebench
    from masksae.study.report.tables import to_text

    own = own_sae.OwnSAE(options.profile, options.sae, out=options.out, l0=options.l0)
    progress.say(f"scoring {options.sae} on {options.profile}: {', '.join(options.metrics)}")
    scores = own_sae.evaluate(own, options.metrics)
    saebench.write_scores(own, scores, own.results / "saebench")
    page = report.write(own, scores)
    _show(options, dict(report.rows(scores)), f"{to_text(report.table(scores))}\n\n{page}")


def explore_sae(options) -> None:
    """One parent of an SAE as a page."""
    from dataclasses import asdict

    from masksae import progress
    from masksae.files import write_text
    from masksae.study import explore, own_sae

    own = own_sae.OwnSAE(options.profile, options.sae, out=options.out)
    progress.say(f"looking at {options.sae} on {options.profile}")
    look, sae = explore.Explorer(own), own.sae
    story = look.letter(sae, options.letter) if options.letter else look.context(sae, options.context)
    file = Path(options.out) / f"{_file_name(own.name, story.parent)}.html"
    write_text(file, _story_page(own.name, story, look.top_contexts(sae, story.main[0])))
    _show(options, asdict(story) | {"page": str(file)}, str(file))


def _story_page(sae: str, story, contexts: str) -> str:
    """HTML page about one parent of the SAE named `sae`, which is the reader's own text; `contexts` is HTML already."""
    from masksae.study.explore import story_html
    from masksae.study.report.page import page

    heading = f"<h1>{html.escape(sae)}</h1>{story_html(story)}<h2>Where its first main latent fires most</h2>"
    return page(f"{story.parent}, {sae}", heading + contexts)


def _file_name(*parts: str) -> str:
    """A file's name out of free text.

    >>> _file_name("my sae", "follows ../b")
    'my-sae-follows-..-b'
    """
    return "-".join(re.sub(r"[^\w.]+", "-", part)[:80] for part in parts)


def export_sae(options) -> None:
    """An SAE in another form."""
    from masksae.export import load_sae

    sae = load_sae(options.sae)
    writers = {"saelens": sae.to_saelens, "dictionary_learning": sae.to_dictionary_learning, "masksae": sae.save}
    folder = str(writers[options.to](options.out))
    _show(options, {"folder": folder}, folder)


if __name__ == "__main__":
    sys.exit(main())
