"""The command line, `masksae` or `python -m masksae`: the only parser, thin over the functions of this package.

Exit status: 0 done, 1 a stage failed or a published number differs, 2 bad input or a place that cannot be written, said
in one line on stderr, 130 interrupted. What was asked for goes to stdout, as text or with --json as one JSON value;
progress and messages go to stderr. What a command needs is imported when it runs, so that --help takes no second.
"""

import argparse
import contextlib
import html
import json
import math
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from masksae.app import DEFAULT
from masksae.app.exits import exit_status
from masksae.errors import ConfigError, nearest, require
from masksae.files import shipped_profiles, write_text

EPILOG = """A PROFILE fixes model, block, text, arms and SAEs. It is a shipped name
({names})
or the path of a YAML file. Downloads and scratch go to ~/.cache/masksae, or
MASKSAE_CACHE. Killed commands go on where they were. `masksae COMMAND --help`
has examples. Those that read or write results/ run in a clone of the project."""

EXAMPLES = {
    "repro": "masksae repro smoke                 every notebook, minutes\n"
    "masksae repro mine.yaml             on a model of your own\n"
    "masksae repro paper paper-gemma     one after the other",
    "status": "masksae status laptop",
    "fetch": "masksae fetch laptop",
    "plan": "masksae plan paper\nmasksae plan mine.yaml --measure",
    "train": "masksae train smoke                 three minutes on two CPU cores\n"
    "masksae train mine.yaml             a model of your own: a profile of 15 lines\n"
    "masksae train mine.yaml --json | jq -r .[].folder",
    "evaluate": "masksae evaluate MY_SAE --metrics absorption,contexts\n"
    "masksae evaluate hub:OWNER/NAME/layers.10 --profile mine.yaml\n"
    "masksae evaluate MY_SAE --profile mine.yaml --json | jq keys",
    "explore": "masksae explore MY_SAE --letter s\nmasksae explore MY_SAE --context the --profile mine.yaml",
    "export": "masksae export MY_SAE OUT --to saelens",
    "pairs": "masksae pairs overnight",
    "gate": "masksae gate",
    "match": "masksae match overnight --arm kept --grid matryoshka_clean --pilot 99\n"
    "masksae match overnight --arm noise --like kept --grid topk20 --pilot 99",
    "check": "masksae check\nmasksae check laptop --json",
    "compare": "masksae compare laptop              after `make repro`: with the last commit\n"
    "masksae compare laptop --with ../other/results/laptop",
    "verify": "masksae verify paper\nmasksae verify paper-gemma --json",
    "reliability": "masksae reliability laptop",
    "share": "masksae share laptop                the folder, build/laptop/hub\n"
    "masksae share overnight --release   archives, build/overnight/release\nmasksae share laptop --to OWNER/NAME",
    "site": "masksae site",
    "guide": "masksae guide",
    "run": "masksae run 03_reconstruction laptop",
    "project": "masksae project laptop",
}


SAE_HELP = (
    "folder of one SAE (SAELens, dictionary_learning, sparsify, Gemma Scope or masksae), "
    "hub:OWNER/NAME[/PATH][@REVISION] or release:PROFILE/SAE"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that masksae raises on purpose are one line on stderr unless --debug asks for the
    traceback."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    return exit_status(lambda: _run(parser().parse_args(arguments)), debug)


def _run(options) -> int | None:
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    """All commands."""
    import masksae

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="masksae", description="Train, score and look at sparse autoencoders, with and without masked tokens.",
        epilog=EPILOG.format(names=", ".join(shipped_profiles())), formatter_class=raw,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"masksae {masksae.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, run, profile: str | None = None):
        """A command of that name; with a default `profile`, one that takes a profile."""
        shown = "examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name].splitlines())
        command = commands.add_parser(name, help=text, description=text, epilog=shown, formatter_class=raw)
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if profile:
            command.add_argument("profile", nargs="?", default=profile, help=f"name or YAML file (default: {profile})")
        return command

    _add_study(add)
    _add_sae(add)
    _add_stages(add)
    return top


def _add_study(add) -> None:
    """Commands about a profile."""
    repro = add("repro", "Bring every result of a profile up to date.", reproduce)
    repro.add_argument("profiles", nargs="*", default=[DEFAULT], help=f"names or YAML files (default: {DEFAULT})")
    add("status", "What `masksae repro` would do.", print_status, DEFAULT)
    plan = add("plan", "What a profile costs: work, hours, memory, disk. No network.", print_plan, DEFAULT)
    plan.add_argument("--measure", action="store_true", help="time a fraction of the work here, too: a minute")
    fetch_ = add("fetch", "Get a profile's model and text; later commands need no network.", fetch, DEFAULT)
    train_ = add("train", "Train the SAEs of a profile, or go on with them.", train, DEFAULT)
    add("pairs", "Train and score a profile pair by pair: the long part of `repro`.", work, DEFAULT)
    gate = add(
        "gate", "Score the variants of a profile, unmasked SAEs only: what makes the regime.", print_gate, "gate"
    )
    match = add(
        "match", "Search the k, or the noise, at which an arm has what it is compared at.", print_match, DEFAULT
    )
    match.add_argument("--arm", required=True, help="whose k or noise is searched for")
    match.add_argument("--grid", required=True, help="name of the SAEs")
    match.add_argument("--pilot", type=int, required=True, help="a pair that is used for nothing else, such as 99")
    match.add_argument(
        "--like", metavar="ARM", help="search the noise that costs as much explained variance as this arm"
    )
    checked = add("check", "Which results are of this profile and code, unrun; status 1 if some are not.", print_states)
    checked.add_argument("profiles", nargs="*", help="names or YAML files (default: all shipped ones with results)")
    again = add("compare", "Do a run's effects and verdicts come again? Status 1 if not.", print_comparison, DEFAULT)
    other = "results of another run (default: this one's, with the last commit's)"
    again.add_argument("--with", dest="folder", metavar="DIR", help=other)
    again.add_argument(
        "--save", dest="kept_as", metavar="NAME", help="keep it in results/PROFILE/reproduced.json, for REPRODUCE.md"
    )
    verify = add("verify", "Published numbers beside a profile's; status 1 if some differ.", print_checks, "paper")
    noise = add(
        "reliability", "Which scores of a finished profile can be trusted: a table.", print_reliability, DEFAULT
    )
    share = add("share", "SAEs of a profile for the hub, in SAELens' form, with a card.", share_saes, DEFAULT)
    to = share.add_mutually_exclusive_group()
    to.add_argument("--to", metavar="OWNER/NAME", help="push them to this repository of the hub")
    to.add_argument("--release", action="store_true", help="archives of the first block's, for masksae.load_sae")
    site = add("site", "Static pages of all that was run: build/site/index.html.", build_site)
    _add_json(plan, fetch_, train_, gate, match, checked, again, verify, noise, share, site)


def _add_sae(add) -> None:
    """Commands about one SAE."""
    evaluate = add("evaluate", "Score an SAE on a profile's model, text and tasks: report.html.", evaluate_sae)
    _add_own_sae(evaluate)
    evaluate.add_argument(
        "--metrics", type=_metrics, default="reconstruction,absorption,contexts",
        help="comma-separated, of reconstruction, absorption, contexts, probing, ood, perturbation, "
        "robustness "
        "(default: the first three)",
    )  # fmt: skip
    evaluate.add_argument("--l0", type=_l0, help="clean L0 of the matched scores (default: the SAE's own k or L0)")
    explore = add("explore", "One parent of an SAE: what it misses, who absorbed that. HTML.", explore_sae)
    _add_own_sae(explore)
    parent = explore.add_mutually_exclusive_group(required=True)
    parent.add_argument("--letter", type=_letter, help='the parent "starts with LETTER"')
    parent.add_argument("--context", help='the parent "follows CONTEXT", such as the')
    export = add("export", "Write an SAE in another form.", export_sae)
    export.add_argument("sae", help=SAE_HELP)
    export.add_argument("out", help="folder to write")
    export.add_argument("--to", choices=("saelens", "dictionary_learning", "masksae"), required=True)
    export.add_argument("--model", help="name of its language model (default: what its file names)")
    export.add_argument("--layer", type=int, help="block after which it reads, for dictionary_learning and SAEBench")
    export.add_argument("--hook", help="name of its hook point, for SAELens")
    _add_json(evaluate, explore, export)


def _add_stages(add) -> None:
    """Commands that DVC or a maintainer calls."""
    add("guide", "Run the guide to a model of one's own into docs/own-model.md.", run_guide)
    run = add("run", "Execute one notebook of a profile (a DVC stage).", run_notebook)
    run.add_argument("notebook", help="such as 03_reconstruction")
    run.add_argument("profile", help="name or YAML file")
    project = add("project", "Write what matters of each notebook (a DVC stage).", project_notebooks)
    project.add_argument("profile", help="name or YAML file")


def _add_json(*commands) -> None:
    for command in commands:
        command.add_argument("--json", action="store_true", help="print JSON")


def _add_own_sae(command) -> None:
    command.add_argument("sae", help=SAE_HELP)
    command.add_argument(
        "--anyway", action="store_true", help="take it though its file names another model or hook point"
    )
    command.add_argument("--profile", default=DEFAULT, help=f"whose model, block, text and tasks (default: {DEFAULT})")
    command.add_argument("--out", default="masksae-report", help="folder for what is written (default: masksae-report)")


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


def _show(options, value, text: str) -> None:
    print(json.dumps(value, indent=1) if options.json else text)


def reproduce(options) -> int:
    """Profiles, one after the other, up to the first that fails."""
    from masksae.app import repro

    return next(filter(None, map(repro.reproduce, options.profiles)), 0)


def print_status(options) -> int:
    """DVC's word on a profile's pipeline."""
    from masksae.app import repro

    return repro.dvc("status", options.profile)


def fetch(options) -> None:
    """Model and text blocks of a profile, into the user's cache."""
    run = _run_with_terms(options.profile)
    sizes = {split: len(blocks) for split, blocks in run.blocks.items()}
    words = ", ".join(f"{n:,} blocks of {split}" for split, n in sizes.items())
    name = run.profile.name
    _show(options, {"profile": name, "blocks": sizes}, f"{name}: model and text are there ({words})")


def _run_with_terms(profile: str):
    """A run, once the terms of its model are accepted."""
    from masksae.app.repro import ask_for_terms
    from masksae.study.run import Run

    run = Run(profile)
    ask_for_terms(run.profile.model.source)
    return run


def print_plan(options) -> None:
    """The cost of a profile."""
    from masksae.app import plan
    from masksae.app.repro import planned

    given = planned(options.profile, options.measure)
    _show(options, plan.record(*given), plan.text(*given))


def train(options) -> None:
    """SAEs of a profile; where each is, and how well it did in training."""
    from masksae.study.report.tables import number, to_text

    run = _run_with_terms(options.profile)
    trained, cells = [], [["in training", "EV", "L0"]]
    for name, sae in run.saes.items():
        folder = next((run.build / "saes").glob(f"*/{name}"))
        last = {key: sae.history[-1][key] for key in ("explained_variance", "l0")}
        trained.append({"sae": name, "folder": str(folder), **last})
        cells.append([name, number(last["explained_variance"]), number(last["l0"], 1)])  # no EV in batches of one token
    next_step = shlex.join(["masksae", "evaluate", trained[-1]["folder"], "--profile", options.profile])
    _show(options, trained, f"{to_text(cells)}\n\n{run.build / 'saes'}\n\nNext: {next_step}")


def work(options) -> None:
    """Every part of a profile."""
    from masksae.app.repro import work_off_pairs

    _run_with_terms(options.profile)
    work_off_pairs(options.profile)


def print_gate(options) -> None:
    """A row per SAE of the variants, and their picture."""
    import pandas as pd

    from masksae.study.figures import gate, style
    from masksae.study.gate import gate_rows
    from masksae.study.report.tables import cells, to_text

    run = _run_with_terms(options.profile)
    rows = gate_rows(run)
    style.style()
    style.save_figure(run, "gate", gate.draw_gate(run.profile, rows), "Unmasked SAEs under one change at a time.")
    _show(options, rows, to_text(cells(pd.DataFrame(rows))))


def print_match(options) -> None:
    """What was searched for, and every trial; kept in results/NAME/matched.json."""
    from masksae.study import search

    run = _run_with_terms(options.profile)
    if options.like:
        found = search.noise_for_ev(run, options.arm, options.like, options.grid, options.pilot)
    else:
        found = search.k_for_clean_l0(run, options.arm, options.grid, options.pilot)
    known = run.result("matched") if (run.results / "matched.json").exists() else []
    same = ("what", "arm", "grid")
    others = [row for row in known if any(row[key] != found[key] for key in same)]
    run.save_result("matched", [*others, found])
    _show(options, found, f"{found['what']} = {found['trials'][-1]['at']:.4g} ({len(found['trials'])} trials)")


def print_states(options) -> int:
    """Results of some profiles, by whether they are of this code; 1 if some are not."""
    from masksae.files import repository, shipped_profiles
    from masksae.study.check import check, has_results, since, summary
    from masksae.study.report import preregistration
    from masksae.study.report.tables import to_text
    from masksae.study.run import Run
    from masksae.study.store import STATES

    names = [name for name in shipped_profiles() if has_results(repository() / "results" / name)]
    if not (asked := options.profiles or names):
        raise ConfigError(f"No shipped profile has results in {repository() / 'results'}. Change into a clone.")
    rows, told = [], []
    for name in asked:
        run = Run(name, writes=False)
        found = check(run)
        rows += [{"profile": run.profile.name} | row for row in found]
        lines = [to_text(summary(found)), *since(found), preregistration.status(run.profile).splitlines()[0]]
        told.append("\n  ".join([name, *lines]))
    _show(options, rows, "\n\n".join(told))
    return int(any(row["state"] != STATES[0] for row in rows))


def print_comparison(options) -> int:
    """Effects and verdicts of two runs of a profile; 1 if some are not the same."""
    from masksae.files import repository
    from masksae.study import compare
    from masksae.study.profile import load_profile
    from masksae.study.report.tables import to_text
    from masksae.study.times import times

    name = load_profile(options.profile).name
    results = repository() / "results" / name
    other = Path(options.folder) if options.folder else results
    there = compare.claims_of(results) if options.folder else compare.committed(repository(), name)
    rows = compare.compared(there, compare.claims_of(other))
    if options.kept_as:
        machine = times(other.resolve().parents[1] / "build" / name)["machine"]
        compare.note(results, options.kept_as, machine, rows)
    _show(options, rows, to_text(compare.table(rows)))
    return int(not all(row["same"] for row in rows))


def print_checks(options) -> int:
    """Published numbers beside those of a profile; 1 if some differ."""
    from masksae.app import verify
    from masksae.study.run import Run

    run = Run(options.profile, writes=False)
    checks = verify.verify(run)
    rows = [asdict(check) | {"verdict": check.verdict} for check in checks]
    _show(options, rows, verify.text(checks, run.profile.name))
    return int(any(check.verdict == "differs" for check in checks))


def print_reliability(options) -> None:
    """The table of docs/metrics.md for a profile that is finished."""
    from masksae.study.report.reliability import page_table, reliability
    from masksae.study.run import Run

    Run(options.profile, writes=False).result("claims")  # what is written last; without it, it says what to run
    table = reliability(options.profile)
    _show(options, json.loads(table.to_json(orient="records")), page_table(table).rstrip())


def share_saes(options) -> None:
    """The folder for the hub, pushed if a repository is named; or archives for a release."""
    from masksae.app import upload
    from masksae.study.run import Run

    run = Run(options.profile)
    make = upload.release if options.release else upload.build
    place = upload.upload(run, options.to) if options.to else str(make(run))
    _show(options, {"address" if options.to else "folder": place}, place)


def build_site(options) -> None:
    """The pages, and where to begin."""
    require("pipeline", "sphinx", "myst_nb", "sphinx_book_theme")
    from masksae.app import site

    address = site.build().as_uri()
    _show(options, {"page": address}, address)


def run_guide(options) -> None:
    """docs/own-model.md, run again."""
    from masksae.app import repro

    print(repro.run_guide())


def run_notebook(options) -> None:
    """One notebook of a profile, into build/."""
    from masksae.app import repro

    repro.execute(options.notebook, options.profile)


def project_notebooks(options) -> None:
    """What a stage depends on of each notebook."""
    from masksae.app import repro

    repro.project_notebooks(options.profile)


def evaluate_sae(options) -> None:
    """Scores of an SAE as a table or JSON, SAEBench files, and a page."""
    require("evaluate", "matplotlib", "seaborn", "zstandard")
    from masksae import progress
    from masksae.study import own_sae
    from masksae.study.report import own_sae as report
    from masksae.study.report import saebench
    from masksae.study.report.tables import to_text

    own = own_sae.OwnSAE(options.profile, options.sae, out=options.out, l0=options.l0, anyway=options.anyway)
    progress.say(f"scoring {options.sae} on {options.profile}: {', '.join(options.metrics)}")
    scores = own_sae.evaluate(own, options.metrics)
    saebench.write_scores(own, scores, own.results / "saebench")
    page = report.write(own, scores)
    _show(options, dict(report.rows(scores)), f"{to_text(report.table(scores))}\n\n{page}")


def explore_sae(options) -> None:
    """One parent of an SAE as a page."""
    from masksae import progress
    from masksae.study import explore, own_sae

    own = own_sae.OwnSAE(options.profile, options.sae, out=options.out, anyway=options.anyway)
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

    given = {"model_name": options.model, "layer": options.layer, "hook_name": options.hook}
    given = {key: value for key, value in given.items() if value is not None}
    takes = {"saelens": {"model_name", "hook_name"}, "dictionary_learning": {"model_name", "layer"}, "masksae": set()}
    if unused := given.keys() - takes[options.to]:
        fields = ", ".join(sorted(unused))
        raise ConfigError(f"The files of {options.to} have no field for {fields}. Leave that option out.")
    sae = load_sae(options.sae)
    writers = {"saelens": sae.to_saelens, "dictionary_learning": sae.to_dictionary_learning, "masksae": sae.save}
    folder = str(writers[options.to](options.out, **given))
    _show(options, {"folder": folder}, folder)
