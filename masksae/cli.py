"""The command `masksae`: thin over the public functions. Exit status 0 done, 1 a check failed, 2 bad input, 130 interrupted."""

import argparse
import json
import sys
from pathlib import Path

from masksae.errors import MasksaeError

DEFAULT = "laptop"

EXAMPLES = """examples:
  masksae plan paper                              what the paper's scale costs; no network
  masksae fetch laptop                            model, text and tasks, once
  masksae train laptop                            SAEs of every arm; goes on where it was
  masksae evaluate MY_SAE --metrics absorption    an SAE of SAELens, dictionary_learning or masksae
  masksae explore MY_SAE --letter s               what its "starts with S" latents miss, and who absorbed it
  masksae export MY_SAE OUT --to saelens          the same SAE in another form

A profile is a shipped name (smoke, laptop, gemma, overnight, paper, ...) or the path of a YAML file. Downloads and scratch go to MASKSAE_CACHE."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that masksae raises on purpose are one line on stderr unless --debug asks for the traceback."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except MasksaeError as error:
        if options.debug:
            raise
        print(f"masksae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("masksae: interrupted; what was finished is kept, and the same command goes on.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """All commands."""
    import masksae

    top = argparse.ArgumentParser(
        prog="masksae", description="Train, score and look at sparse autoencoders, with and without masked tokens.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=masksae.__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, run, *, profile: bool = False):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if profile:
            command.add_argument(
                "profile", nargs="?", default=DEFAULT, help=f"name or path of a YAML file (default: {DEFAULT})"
            )
        return command

    add("fetch", "download and check what a profile needs, so that later commands need no network", fetch, profile=True)
    plan = add("plan", "what a profile costs: work, hours, memory, disk; needs no network", print_plan, profile=True)
    plan.add_argument("--measure", action="store_true", help="time a fraction of the work here, too")
    train = add("train", "train the SAEs of a profile, or go on with them", train_profile, profile=True)
    train.add_argument("--json", action="store_true", help="print one JSON object per SAE")
    evaluate = add(
        "evaluate",
        "score an SAE on a profile's model, text and tasks; writes tables, SAEBench files and report.html",
        evaluate_sae,
    )
    _guest(evaluate)
    evaluate.add_argument(
        "--metrics",
        default="reconstruction,absorption,contexts",
        help="comma-separated: reconstruction, absorption, contexts, probing, ood, perturbation",
    )
    evaluate.add_argument(
        "--l0", type=float, help="clean L0 of the matched scores (default: the SAE's own k, target or L0)"
    )
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    explore = add(
        "explore",
        "a parent of an SAE: what its main latents miss, and who absorbed it; writes an HTML page",
        explore_sae,
    )
    _guest(explore)
    parent = explore.add_mutually_exclusive_group(required=True)
    parent.add_argument("--letter", help='the parent "starts with LETTER"')
    parent.add_argument("--context", help='the parent "follows CONTEXT", such as the')
    export = add("export", "write an SAE in another form", export_sae)
    export.add_argument("sae", help="folder of one SAE")
    export.add_argument("out", help="folder to write")
    export.add_argument("--to", choices=("saelens", "dictionary_learning", "masksae"), required=True)
    return top


def _guest(command) -> None:
    command.add_argument("sae", help="folder of one SAE (SAELens, dictionary_learning or masksae)")
    command.add_argument("--profile", default=DEFAULT, help=f"whose model, block, text and tasks (default: {DEFAULT})")
    command.add_argument("--out", default="masksae-report", help="folder for what is written (default: masksae-report)")


def fetch(options) -> None:
    """Model, text blocks and tasks of a profile, into the user's cache."""
    from masksae.pipeline import ask_for_terms
    from masksae.stages import Run

    run = Run(options.profile)
    ask_for_terms(run.profile.model.source)
    sizes = {split: len(blocks) for split, blocks in run.blocks.items()}
    print(
        f"{run.profile.name}: model and text are there ({', '.join(f'{n} blocks of {split}' for split, n in sizes.items())})"
    )


def print_plan(options) -> None:
    """The cost of a profile."""
    from masksae import pipeline

    pipeline.print_plan(options.profile, options.measure)


def train_profile(options) -> None:
    """SAEs of a profile; where each is, and how well it did in training."""
    from masksae.stages import Run

    run = Run(options.profile)
    for name, sae in run.saes.items():
        folder = next((run.build / "saes").glob(f"*/{name}"))
        last = sae.history[-1] if sae.history else {}
        record = {
            "sae": name,
            "folder": str(folder),
            "explained_variance": last.get("explained_variance"),
            "l0": last.get("l0"),
        }
        print(
            json.dumps(record)
            if options.json
            else f"{name:32} EV {record['explained_variance']:.3f}  L0 {record['l0']:6.1f}  {folder}"
        )


def evaluate_sae(options) -> None:
    """Scores of an SAE as a table or JSON, SAEBench files, and a page."""
    from masksae import guest, guest_report

    visitor = guest.Guest(options.profile, options.sae, out=options.out, l0=options.l0)
    found = guest.evaluate(visitor, [name.strip() for name in options.metrics.split(",")])
    guest.saebench(visitor, found)
    report = guest_report.write(visitor, found)
    if options.json:
        print(json.dumps({words: values for words, values in guest_report.rows(found)}, indent=1))
        return
    print(f"{'':44}{'as trained':>12}{'matched':>12}")
    for words, values in guest_report.rows(found):
        cells = "".join(f"{guest_report.number(values.get(m)):>12}" for m in ("as_trained", "matched"))
        print(f"{words[:43]:44}{cells}")
    print(f"\n{report}")


def explore_sae(options) -> None:
    """One parent of an SAE as a page."""
    from masksae import explore, guest
    from masksae.files import write_text
    from masksae.site import page

    visitor = guest.Guest(options.profile, options.sae, out=options.out)
    look, sae = explore.Explorer(visitor), visitor.sae
    story = look.letter(sae, options.letter) if options.letter else look.context(sae, options.context)
    body = f"<h1>{visitor.name}</h1>{explore.story_html(story)}<h2>Where its first main latent fires most</h2>{look.top_contexts(sae, story.main[0])}"
    print(
        write_text(
            Path(options.out) / f"{story.parent.replace(' ', '-')}.html", page(f"{story.parent}, {visitor.name}", body)
        )
    )


def export_sae(options) -> None:
    """An SAE in another form."""
    from masksae.guest import load_sae

    sae = load_sae(options.sae)
    print(
        {"saelens": sae.to_saelens, "dictionary_learning": sae.to_dictionary_learning, "masksae": sae.save}[options.to](
            options.out
        )
    )


if __name__ == "__main__":
    sys.exit(main())
