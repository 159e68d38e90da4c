"""An id of code is that of the code that runs, with the libraries below it, and of nothing else."""

import ast
import functools
import json
import linecache
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from tiny_project import profile

from masksae import Run, provenance
from masksae.errors import CodeError
from masksae.study.scores.reconstruction import clean_scores

INPUTS, RUN, SCORE = "study.inputs", "study.run", "study.scores.absorption"
CHAIN = {
    "data/texts.py": ("_text", INPUTS),
    "data/blocks.py": ("token_blocks", INPUTS),
    "masking.py": ("mask_tokens", INPUTS),
    "tracing.py": ("_run_to", INPUTS),
    "activations.py": ("_order", INPUTS),
    "study/inputs.py": ("replacement", INPUTS),
    "saes/sparse.py": ("sparse_step", RUN),
    "saes/loss.py": ("aux_loss", RUN),
    "training/step.py": ("_descend", RUN),
    "study/run.py": ("_train", RUN),
    "metrics/reconstruction.py": ("calibrated_threshold", SCORE),
    "metrics/absorption.py": ("absorbed", SCORE),
    "study/scores/matched.py": ("matched_threshold", SCORE),
}
"""A function of each module on the way from text to a score, and the first id of code that rests on it."""

REST_ON = {INPUTS: [INPUTS, RUN, SCORE], RUN: [RUN], SCORE: [SCORE]}
"""The ids of code that rest on another; scores are kept under the ids of their SAEs besides, so these need not name
what trains."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that ids are taken of."""
    shutil.copytree(provenance.PACKAGE, tmp_path / "masksae", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "masksae")
    provenance._reached.cache_clear()
    yield tmp_path / "masksae"
    provenance._reached.cache_clear()


def new_process() -> None:
    """Forget what files said when they were loaded."""
    for path in [path for path in provenance._texts if path.is_relative_to(provenance.PACKAGE)]:
        del provenance._texts[path]
    provenance._reached.cache_clear()


def edit(path, function: str, line: str) -> None:
    """Put a line at the beginning of a function's body."""
    lines = path.read_text(encoding="utf-8").split("\n")
    tree = ast.parse("\n".join(lines))
    found = next(node for node in ast.walk(tree) if getattr(node, "name", None) == function)
    first = found.body[1] if ast.get_docstring(found) else found.body[0]
    lines.insert(first.lineno - 1, " " * first.col_offset + line)
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("file", CHAIN)
def test_an_edit_on_the_way_to_a_score_moves_the_ids_from_there_on(package, file):
    before, (function, first) = {name: provenance.code_id(name) for name in REST_ON}, CHAIN[file]
    edit(package / file, function, "assert not None")
    new_process()
    assert [name for name in REST_ON if provenance.code_id(name) != before[name]] == REST_ON[first]


def test_scores_rest_on_the_ids_of_their_saes(project):
    [part, *_], made = Run(profile(project)).parts, []
    make = lambda some: [{"sae": name, "n": made.append(1) or len(made)} for name in some.names]
    score = lambda part: [row["n"] for row in part.rows("try", part.profile.evaluation, make)]
    assert score(part) == score(part) == [1, 2]
    [part, *_] = Run(profile(project)).parts
    part.entries[1] = replace(part.entries[1], code={"modules": {"training.step": "edited"}, "versions": {}})
    assert score(part) == [1, 3]


@pytest.mark.parametrize(
    "module",
    [
        "study/figures/style",
        "study/report/tables",
        "study/stats",
        "app/site",
        "app/repro",
        "progress",
        "errors",
        "files",
    ],
)
def test_pictures_pages_and_messages_move_no_id(package, module):
    before = provenance.code_id(SCORE)
    path = package / f"{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nNEW = 1\n", encoding="utf-8")
    new_process()
    assert provenance.code_id(SCORE) == before


def test_words_layout_and_annotations_move_no_id(package):
    path, before = package / "masking.py", provenance.code_id(INPUTS)
    text = path.read_text(encoding="utf-8")
    for old, new in (
        ('"""Replace each token', '"""Put something in the place of each token'),
        ("# fmt: skip", "# left as it is"),
        ("must lie in [0, 1], found", "must lie between 0 and 1, found"),
        ("token_id: int", "token_id: object"),
        (") -> tuple[Tensor, Tensor]:", "):"),
        ("    n, s = ids.shape\n", "\n    n, s = (\n        ids.shape\n    )\n"),
    ):
        assert old in text
        text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        assert provenance.code_id(INPUTS) == before  # in the process that loaded it before
        new_process()
        assert provenance.code_id(INPUTS) == before
    path.write_text(text.replace("uniform[:, 0] < p", "uniform[:, 0] <= p"), encoding="utf-8")
    new_process()
    assert provenance.code_id(INPUTS) != before


def test_a_function_outside_the_package_is_known_by_its_file():
    assert provenance.code_id(edit) == provenance.code_id(new_process) != provenance.code_id(profile)


def test_what_is_typed_into_a_notebook_is_known_by_its_cells():
    first, second = (typed(f"def make(some): return {n}", f"<cell {n}>") for n in (1, 2))
    assert provenance.code_id(first["make"]) != provenance.code_id(second["make"])
    assert provenance.made_by(first["make"])["modules"].keys() == {"notebook"}
    rule = typed("class Rule:\n    def dense(self): return 1", "<cell 3>")["Rule"]
    assert provenance.made_by(rule) != provenance.made_by(first["make"])


def typed(text: str, cell: str = "<cell>", **names) -> dict:
    """What a notebook knows after a cell."""
    linecache.cache[cell] = (len(text), None, text.splitlines(True), cell)
    exec(compile(text, cell, "exec"), made := {"__name__": "a_notebook", **names})
    return made


class Score:
    """One that is called, as functions are."""

    def __init__(self, k):
        self.k = k

    def __call__(self, some):
        return self.k

    def take(self, some):
        return self.k


@pytest.mark.parametrize(
    "make",
    [
        lambda k: lambda some: k,
        lambda k: lambda some, k=k: k,
        lambda k: functools.partial(Score.take, k=k),
        lambda k: Score(k),
        lambda k: Score(k).take,
        lambda k: typed("make = lambda some: k", k=k)["make"],
        lambda k: typed("make = lambda some: [k for _ in some]", k=k)["make"],
        lambda k: typed("make = lambda some: f(some)", f=typed(f"def f(some): return {k}", f"<{k}>")["f"])["make"],
        lambda k: typed(f"class Score:\n    def __call__(self, some): return {k}", f"<{k}>")["Score"](),
        lambda k: eval(f"lambda some: {k}", {"__name__": "a_notebook"}),  # nobody has its source
    ],
    ids=["closure", "default", "partial", "object", "method", "global", "inner", "helper", "typed object", "no source"],
)
def test_the_values_that_a_score_carries_belong_to_it(make):
    first, again, other = (provenance.made_by(make(k)) for k in (20, 20, 40))
    assert first == again != other


def test_what_a_score_fills_is_no_part_of_it():
    seen = []
    score = lambda some: seen.append(some)
    before = provenance.made_by(score)
    score(1)
    assert provenance.made_by(score) == before and "values" not in before["modules"]


def test_what_was_typed_rests_on_what_it_takes_from_the_package(package):
    import masksae
    from masksae import metrics

    texts = ["m.reconstruction.reconstruction(some)", "metrics.explained_variance(some)", "clean_scores(some)"]
    names = {"m": metrics, "metrics": metrics, "masksae": masksae, "clean_scores": clean_scores}
    made = [provenance.made_by(typed(f"make = lambda some: {text}", **names)["make"]) for text in texts]
    assert all("metrics.reconstruction" in each["modules"] and "torch" in each["versions"] for each in made[:2])
    file = package.parent / "mine.py"
    file.write_text("from masksae import TrainConfig\nfrom masksae.metrics import explained_variance\n")
    modules = provenance.made_by(str(file))["modules"]
    assert {"mine.py", "training.config", "metrics.reconstruction"} <= modules.keys()


def test_a_base_class_of_another_cell_is_part_of_a_rule():
    def rule(n: int) -> type:
        base = typed(f"class Base:\n    def dense(self): return {n}", f"<base {n}>")["Base"]
        return typed("@dataclass\nclass Rule(Base):\n    k: int", Base=base, dataclass=dataclass)["Rule"]

    assert provenance.code_id(rule(1)) == provenance.code_id(rule(1)) != provenance.code_id(rule(2))


def test_files_and_cells_of_one_name_count_all(tmp_path):
    for folder, text in {"a": "A = 1", "b": "B = 1", "c": "B = 2"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rule.py").write_text(text)
    a, b, c = (str(tmp_path / folder / "rule.py") for folder in "abc")
    assert len({provenance.code_id(*each) for each in ([a], [b], [a, b], [a, c])}) == 4
    assert provenance.code_id(a, b) == provenance.code_id(b, a) == provenance.code_id(a, b, a)
    one, two, three = (provenance.made_by(typed(f"def f(): return {n}", f"<{n}>")["f"]) for n in (1, 2, 3))
    assert provenance.joined(one, three) != provenance.joined(two, three) and provenance.joined(one, one) == one


@pytest.mark.parametrize("left", [".#masking.py", "._masking.py"])
def test_what_an_editor_or_a_file_system_leaves_beside_the_modules_is_no_module(tmp_path, left):
    shutil.copytree(provenance.PACKAGE, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    if left.startswith(".#"):
        (tmp_path / "src" / left).symlink_to("somebody@somewhere.1234")
    else:
        (tmp_path / "src" / left).write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / "masksae").symlink_to("src")  # a folder of another name behind a link
    say = "import masksae.provenance as p; print(*p.made_by('saes.penalties')['modules'], p.changed())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", say], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == " ".join([*provenance.made_by("saes.penalties")["modules"], "[]"]), done.stderr


def test_a_reload_after_an_edit_is_no_new_code_where_the_rest_holds_what_was_there(package):
    path = package / "saes/rules.py"
    assert provenance.code_id("saes.rules")
    edit(path, "goal", "assert not None")
    provenance.remember(path, anew=True)  # as defining a rule does
    with pytest.raises(CodeError, match="saes.rules .* has changed since it was loaded"):
        provenance.code_id("saes.rules")


def test_what_a_file_imports_is_looked_up_again_when_it_is_loaded_anew(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch")
    assert provenance.made_by(str(file))["modules"].keys() == {"mine.py"}
    file.write_text("from masksae.masking import mask_tokens")
    provenance.remember(file, anew=True)
    assert provenance.made_by(str(file))["modules"].keys() == {"mine.py", "masking"}


def test_an_edit_that_this_process_did_not_load_is_refused(package):
    before, path = provenance.code_id(SCORE), package / "metrics/absorption.py"
    edit(path, "absorbed", "assert not None")
    with pytest.raises(CodeError, match="metrics.absorption .* has changed since it was loaded.*Restart the kernel"):
        provenance.code_id(SCORE)
    assert provenance.code_id(RUN)  # which does not rest on it
    assert provenance.changed() == ["metrics.absorption"]
    new_process()
    assert provenance.code_id(SCORE) != before and provenance.changed() == []


SESSION = """
import sys
from pathlib import Path
import masksae
from masksae.errors import CodeError
from masksae.study.check import check
from masksae.study.scores.reconstruction import clean_scores
run = masksae.Run("tiny.yaml")
if sys.argv[1] == "edit":
    first = run.scored(clean_scores)[0]["ev_centred"]
    file = Path(masksae.__file__).parent / "metrics/reconstruction.py"
    file.write_text(file.read_text() + "\\nNEW = 1\\n")
    try:
        masksae.Run("tiny.yaml").scored(clean_scores)
    except CodeError as error:
        print("refused", str(error).split()[0])
run.save_result("claims", {})
rows = check(masksae.Run("tiny.yaml")) if sys.argv[1] == "check" else []
rows = [row for row in rows if row["score"] == "clean" and row["sae"] in run.saes]
print(*{(row["state"], *row["changed"]) for row in rows})
"""


def test_with_a_kernel_open_an_edit_is_refused_and_the_next_process_knows_it(project, tmp_path):
    """A copy of the package in real processes: one that loads it, scores, and has it edited; and the next."""
    package = tmp_path / "copy/masksae"
    shutil.copytree(provenance.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    profile(project)
    environment = os.environ | {"PYTHONPATH": str(package.parent), "MASKSAE_PROGRESS": "none"}

    def session(what: str) -> str:
        command = [sys.executable, "-c", SESSION, what]
        done = subprocess.run(command, env=environment, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert session("edit") == "refused metrics.reconstruction"
    assert session("check") == "('other code', 'metrics.reconstruction')"


def test_another_version_of_a_library_moves_what_rests_on_it(project, monkeypatch):
    [part, *_] = Run(profile(project)).parts
    before = provenance.made_by(SCORE, "study.scores.probing"), provenance.made_by("study.run")
    assert "torch" in before[1]["versions"] and "scikit-learn" in before[0]["versions"]
    make = lambda some: [{"sae": name, "n": 1} for name in some.names]
    part.rows("try", part.profile.evaluation, make)
    real = provenance.metadata.version
    for library in ("scikit-learn", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(provenance.metadata, "version", lambda name: "99.1+cpu" if name == library else real(name))
            provenance._version.cache_clear()
            after = provenance.made_by(SCORE, "study.scores.probing"), provenance.made_by("study.run")
            assert after[0]["versions"][library] == "99.1" and (after[1] != before[1]) == (library == "torch")
            [again, *_] = Run(profile(project)).parts
            again.asked = []
            again.rows("try", part.profile.evaluation, make)
            provenance._version.cache_clear()
        states = {row["state"]: row["changed"] for row in again.asked}
        told = {"other versions": [f"torch {before[1]['versions']['torch']}, now 99.1"]}
        assert states == (told if library == "torch" else {"as it is now": []})
    assert json.loads(part.notes.file.read_text())["made_by"]
