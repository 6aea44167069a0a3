"""Data sets: rows are answered together where they can be; what is wrong with one stays with it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_rows import read, write

import omni
from omni import batch as batch_module
from omni import rows as omni_rows
from omni.answer import method_of
from omni.arguments import OUT_OF_MEMORY
from omni.batch import ModelReplica, Pool, PrepareWorker, argument_parser, main, pack, unpack
from omni.inputs import InputError
from omni.processing import reader
from omni.processing.frames import Pixels
from omni.processing.media import MediaError
from omni.rows import Journal, Source, only_run
from tests.omni.pairs import ENVIRONMENT

pyarrow = pytest.importorskip("pyarrow")
ALONE = Pool(decoders=1, replicas=1, threads=1, reserved=1, device="cpu")


def options(checkpoint: Path, questions: Path, *more: str) -> argparse.Namespace:
    return argument_parser().parse_args(
        [
            "--model",
            str(checkpoint),
            "--max-new-tokens",
            "5",
            *more,
            str(questions),
            str(questions.parent / "out.jsonl"),
        ]
    )


@pytest.mark.parametrize("media", [5, {"a.png": 1}, ["a.png", None], [["a.png"]], True])
def test_media_are_paths(tmp_path: Path, checkpoint: Path, media: Any) -> None:
    """Protects: a row's mistake is said in our words."""
    prepare = PrepareWorker(options(checkpoint, tmp_path / "q.jsonl"), ALONE, set())
    with pytest.raises(InputError, match="media must be a path, a list of paths, or null"):
        prepare.prepared({"id": 1, "question": "?", "media": media})


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_for_media(tmp_path: Path, checkpoint: Path, model: omni.Omni, question: str) -> None:
    """Protects: captioners are asked nothing, and nothing is asked about nothing."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    prepare = PrepareWorker(options(checkpoint, tmp_path / "q.jsonl"), ALONE, set())
    for media in (None, []):
        with pytest.raises(InputError, match="the row has neither media nor a question"):
            prepare.prepared({"id": 1, "question": question, "media": media})
    _, found = prepare.prepared({"id": 1, "question": question, "media": "a.png"})
    content = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": question}]
    expected = [{"role": "user", "content": content if question else content[:1]}]
    assert torch.equal(found.input_ids, model.prepare(expected).input_ids)


def test_lines_end_at_line_ends_alone(tmp_path: Path, checkpoint: Path) -> None:
    """Protects: characters that Unicode calls line ends, and bytes that are no UTF-8, cost no other row."""
    path = tmp_path / "q.jsonl"
    rows = [{"id": n, "question": f"a\u2028b\x85c{n}"} for n in range(2)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join([lines[0], b'{"id": "\xff"}', b"", lines[1]]))
    prepare = PrepareWorker(options(checkpoint, path), ALONE, set())
    source = Source(path)
    ids, unreadable = source.scan()
    assert ids == [0, 1] and [row["id"] for row in unreadable] == ["line 2"]
    found = [prepare(pyarrow.table({"start": [start]}))["row"] for start in source.starts]
    assert [[told["id"] for row in one for told in json.loads(row)] for one in found] == [[0], [1]]


def test_answers_together_are_those_one_by_one(tmp_path: Path, checkpoint: Path, clip: Path, model: omni.Omni) -> None:
    """Rows of two lengths and settings, with a clip, without, and with what cannot be answered among them."""
    rows = [
        {"id": "clip", "media": str(clip), "question": "What happens?"},
        {"id": "same", "media": [str(clip)], "question": "What is seen?"},
        {"id": "all", "media": str(clip), "question": "What happens?", "retention": 1},
        {"id": "text", "media": None, "question": "Who are you?"},
        {"id": "gone", "media": "gone.mp4", "question": "?"},
        {"id": "mute", "media": None},
        {"id": "wrong", "media": None, "question": "?", "seed": -1},
        {"id": "done", "media": None, "question": "?"},
    ]
    given = options(checkpoint, write(tmp_path / "q.jsonl", *rows))
    prepare, answer = PrepareWorker(given, ALONE, {"done"}), ModelReplica(given, ALONE)
    source = Source(given.questions)
    source.scan()
    made = [prepare(pyarrow.table({"start": [start]})) for start in source.starts]
    assert made[-1] == {"row": [], "tensors": []}
    table = pyarrow.table({name: [value for one in made for value in one[name]] for name in ("row", "tensors")})
    found = {line["id"]: line for line in map(json.loads, answer(table)["answer"])}
    assert found.keys() == {row["id"] for row in rows} - {"done"}
    assert "gone.mp4 does not exist" in found["gone"]["error"]
    assert found["mute"]["error"] == "the row has no question."
    assert found["wrong"]["error"].startswith("seed: must be from 0")
    for row in rows[:4]:
        content: list[dict[str, str]] = [{"type": "text", "text": row["question"]}]
        if row["media"]:
            content.insert(0, {"type": "video", "video": str(clip)})
        inputs = model.prepare([{"role": "user", "content": content}])
        seats = None if row.get("retention") == 1 else method_of(given, model.config)
        alone = model.generate(inputs, seats=seats, max_new_tokens=5)
        assert found[row["id"]]["tokens"] == alone.tokens
        assert found[row["id"]]["text"] == alone.text
        assert found[row["id"]]["stats"]["segments"] == alone.stats.segments


def test_rows_have_stretches_and_addresses_but_fetch_nothing(tmp_path: Path, checkpoint: Path, clip: Path) -> None:
    """Columns start and end cut a row's media, and do not keep it from being answered beside others; file:// is read;
    no row has anything fetched, whatever columns it has: that is the command line's to allow."""
    prepare = PrepareWorker(options(checkpoint, tmp_path / "q.jsonl"), ALONE, set())
    made = [
        prepare.prepared({"id": 1, "media": clip.as_uri(), "question": "What?", "start": start, "end": start + 2})
        for start in (0, 1.5)
    ]
    settings = []
    for told, inputs in made:
        assert inputs.video_grid_thw is not None and inputs.video_grid_thw[0, 0] == 2
        assert inputs.input_features is not None and inputs.input_features.shape[2] == 200
        settings.append(told["settings"])
    assert settings[0] == settings[1]
    with pytest.raises(MediaError, match=r"video_start is 60 s"):
        prepare.prepared({"id": 1, "media": str(clip), "question": "?", "start": 60})
    with pytest.raises(MediaError, match=r"192\.0\.2\.1/a\.mp4 is on the network: urls=True \(--urls\)"):
        prepare.prepared({"id": 1, "media": "https://192.0.2.1/a.mp4", "question": "?", "urls": True})
    with pytest.raises(InputError, match="start: must be 0 or more"):
        prepare.prepared({"id": 1, "media": str(clip), "question": "?", "start": -1})


def one_by_one(table: Any) -> list[Any]:
    return [table.slice(row, 1) for row in range(len(table))]


def test_an_address_is_fetched_once_for_its_rows(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: rows about one address are one download, which is gone after them."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        media = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("a.png", "gone.png")]
        rows = [{"id": number, "media": media[:1], "question": f"{number}?"} for number in range(3)]
        rows += [{"id": 3, "media": media[:1] * 2, "question": "?"}, {"id": 4, "media": media, "question": "?"}]
        path = write(tmp_path / "q.jsonl", *rows)
        source, prepare = Source(path), PrepareWorker(options(checkpoint, path, "--urls"), ALONE, set())
        source.scan()
        made = [prepare(row) for row in one_by_one(source.rows(Tables, source.groups()))]
        server.shutdown()
    told = [told for one in made for row in one["row"] for told in json.loads(row)]
    assert [one["id"] for one in told] == [0, 1, 2, 3, 4] and [one["id"] for one in told if "error" in one] == [4]
    assert asked == ["/a.png", "/a.png", "/a.png", "/gone.png"]  # once for each group
    assert not list((tmp_path / "temporary").iterdir())


class Tables:
    """Instead of `ray.data`: what it would be given."""

    from_arrow = staticmethod(lambda table: table)
    read_parquet = staticmethod(lambda path: path)


def as_parquet(questions: Path) -> Path:
    """The same rows as a file of Parquet, with a column that is none of ours."""
    from pyarrow import parquet

    rows = [{**json.loads(line), "answer": "left alone"} for line in questions.read_text().splitlines()]
    names = sorted({name for row in rows for name in row})
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    parquet.write_table(table, questions.with_suffix(".parquet"))
    return questions.with_suffix(".parquet")


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_about_the_same_media_become_groups(
    tmp_path: Path, checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they stand, where the first of them stands; those that would be read otherwise, and those without
    media, are by themselves; no row is lost or there twice, and a group that is too long is several."""
    monkeypatch.setattr(omni_rows, "MOST_TOGETHER", 3)
    about = [["a"], ["b"], [], ["a", 1], ["b"], ["a"], [], ["c", "a"], ["a", 1], ["a"], ["a"], ["a"], ["c", "a"]]
    rows = [
        {"id": number, "media": [each for each in media if each != 1], "question": "?", "fps": media[1:] == [1] or None}
        for number, media in enumerate(about)
    ]
    path = write(tmp_path / "q.jsonl", *rows)
    path = as_parquet(path) if kind == ".parquet" else path
    source = Source(path)
    assert source.scan() == (list(range(len(rows))), [])
    assert source.repeats()
    groups = source.groups()
    assert groups is not None
    prepare = PrepareWorker(options(checkpoint, path), ALONE, set())
    table = source.rows(Tables, groups)
    found = [prepare.rows(row) for row in table.to_pylist()]
    assert [[row["id"] for row in some] for some in found] == [
        [0, 5, 9], [10, 11], [1, 4], [2], [3, 8], [6], [7, 12]
    ]  # fmt: skip
    for row in (row for some in found for row in some):
        expected = rows[row["id"]]
        assert {name: row.get(name) for name in expected} == expected


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_without_repeats_nothing_changes(tmp_path: Path, kind: str) -> None:
    """Rows go through as they come, and none of them is held."""
    rows = [{"id": number, "media": [f"{number}.png"], "question": "?"} for number in range(4)]
    path = write(tmp_path / "q.jsonl", *rows)
    path = as_parquet(path) if kind == ".parquet" else path
    source = Source(path)
    source.scan()
    assert source.groups() is None and not source.repeats()
    found = source.rows(Tables, None)
    if kind == ".parquet":
        assert found == str(path)
    else:
        assert found.to_pylist() == [{"start": start} for start in source.starts]
    # One medium of several is there twice: no group, but worth keeping.
    source = Source(write(tmp_path / "p.jsonl", *({"id": n, "media": ["a.png", f"{n}.png"]} for n in range(2))))
    source.scan()
    assert source.groups() is None and source.repeats()


def test_a_group_is_read_once_and_its_rows_fail_alone(
    tmp_path: Path, checkpoint: Path, clip: Path, model: omni.Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clip, of which one row is answered already and two cannot be: a pack that holds the clip once, as bytes, and
    answers that are those of each row alone."""
    texts: list[str | None] = ["What happens?", None, "What is seen when the tone stops?", "Why?", "Done?", "Who?"]
    rows = [{"id": number, "media": str(clip), "question": text} for number, text in enumerate(texts)]
    rows[3]["seed"] = -1
    path = write(tmp_path / "q.jsonl", *rows)
    given = options(checkpoint, path, "--fps", "1", "--max-frames", "4")
    prepare, answer = PrepareWorker(given, ALONE, {4}), ModelReplica(given, ALONE)
    source = Source(path)
    source.scan()
    calls: list[int] = []
    read_video = reader.read_video
    monkeypatch.setattr(reader, "read_video", lambda *a, **k: calls.append(1) or read_video(*a, **k))
    made = prepare(source.rows(Tables, source.groups()))
    assert len(calls) == 1
    (told,), (tensors,) = map(list, (map(json.loads, made["row"]), made["tensors"]))
    assert [one["id"] for one in told] == [0, 1, 2, 3, 5] and [one["id"] for one in told if "error" in one] == [1, 3]
    requests = unpack(tensors)
    held = requests[0].held("pixel_values_videos")
    assert isinstance(held, Pixels) and all(each.held("pixel_values_videos") is held for each in requests)
    assert len(tensors) < 1.1 * (held.frames[0].nbytes + requests[0].input_features.nbytes) + 20_000
    together: list[int] = []
    generate = answer.model.generate
    monkeypatch.setattr(
        answer.model, "generate", lambda inputs, **k: together.append(len(inputs)) or generate(inputs, **k)
    )
    found = {line["id"]: line for line in map(json.loads, answer(pyarrow.table(made))["answer"])}
    assert found.keys() == {0, 1, 2, 3, 5} and sum(together) == 3
    assert found[1]["error"] == "the row has no question." and "seed" in found[3]["error"]
    for number in (0, 2, 5):
        content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": texts[number]}]
        inputs = model.prepare([{"role": "user", "content": content}], fps=1, max_frames=4)
        alone = model.generate(inputs, seats=method_of(given, model.config), max_new_tokens=5)
        assert found[number]["tokens"] == alone.tokens


def test_a_file_that_changes_meanwhile_is_two(tmp_path: Path, checkpoint: Path) -> None:
    """Protects: a question is answered about what was there when it was read; what is packed comes back."""
    path = tmp_path / "a.png"
    Image.new("RGB", (56, 56), "red").save(path)
    rows = [{"id": number, "media": "a.png", "question": f"{number}?"} for number in range(3)]
    questions = write(tmp_path / "q.jsonl", {"id": "gone", "media": "a.png", "question": 1}, *rows)
    prepare = PrepareWorker(options(checkpoint, questions), ALONE, set())
    source, prepared = Source(questions), prepare.prepared
    source.scan()

    def changing(row: dict[str, Any]) -> Any:
        if row["id"] == 2:
            Image.new("RGB", (56, 56), "blue").save(path)
            os.utime(path, (1, 1))
        return prepared(row)

    prepare.prepared = changing  # type: ignore[method-assign]
    made = prepare(source.rows(Tables, source.groups()))
    assert [[one["id"] for one in json.loads(row)] for row in made["row"]] == [["gone", 0, 1], [2]]
    first, second = (unpack(tensors) for tensors in made["tensors"])
    assert len(first) == 2 and len(second) == 1
    colours = [each[0].held("pixel_values").frames[0][0, :, 0, 0].tolist() for each in (first, second)]
    assert colours == [[255, 0, 0], [0, 0, 255]]
    again = unpack(pack(first, torch.float32))
    assert [torch.equal(one.input_ids, other.input_ids) for one, other in zip(first, again, strict=True)] == [True] * 2
    assert again[0].held("pixel_values").sizes == first[0].held("pixel_values").sizes
    assert again[0].use_audio_in_video is first[0].use_audio_in_video


@pytest.mark.parametrize("kind", ["clip", "picture"])
def test_a_row_may_name_a_medium_twice(tmp_path: Path, checkpoint: Path, clip: Path, kind: str) -> None:
    """Protects: what is read once is one tensor, which safetensors does not store under two names. It is packed once,
    in its places among others, and comes back as it was."""
    if kind == "picture":
        for colour in ("red", "blue"):
            Image.new("RGB", (56, 56), colour).save(tmp_path / f"{colour}.png")
    media = [str(clip)] * 2 if kind == "clip" else ["red.png", "blue.png", "red.png"]
    rows = [{"id": number, "media": media, "question": f"{number}?"} for number in range(2)]
    given = options(checkpoint, write(tmp_path / "q.jsonl", *rows), "--fps", "1", "--max-frames", "4")
    prepare = PrepareWorker(given, ALONE, set())
    expected = prepare.prepared(rows[0])[1]
    source = Source(given.questions)
    source.scan()
    made = prepare(source.rows(Tables, source.groups()))
    (told,), (tensors,) = map(list, (map(json.loads, made["row"]), made["tensors"]))
    assert [one["id"] for one in told if "error" not in one] == [0, 1]
    found, name = unpack(tensors)[0], "pixel_values_videos" if kind == "clip" else "pixel_values"
    assert torch.equal(getattr(found, name), getattr(expected, name))
    assert len({frames.data_ptr() for frames in unpack(tensors)[0].held(name).frames}) == len(set(media))


def test_what_cannot_be_packed_is_its_rows_error(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the rows beside it, and the run."""
    rows = [{"id": number, "media": None, "question": f"{number}?"} for number in range(2)]
    given = options(checkpoint, write(tmp_path / "q.jsonl", *rows))
    prepare, answer = PrepareWorker(given, ALONE, set()), ModelReplica(given, ALONE)

    def failing(requests: list[omni.Inputs], dtype: torch.dtype) -> bytes:
        if calls:
            raise RuntimeError("no")
        calls.append(1)
        return pack(requests, dtype)

    calls: list[int] = []
    monkeypatch.setattr(batch_module, "pack", failing)
    made = [prepare(pyarrow.Table.from_pylist([row])) for row in rows]
    table = pyarrow.table({name: [value for one in made for value in one[name]] for name in ("row", "tensors")})
    found = {line["id"]: line for line in map(json.loads, answer(table)["answer"])}
    assert found.keys() == {0, 1} and found[0]["text"] and found[1]["error"] == "RuntimeError: no"


def cut_sound(path: Path) -> str:
    """Noise that says that it is four seconds long, and is some two."""
    import av

    noise = np.random.default_rng(0).integers(-9999, 9999, (1, 4 * 16_000)).astype(np.int16)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("flac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.sample_rate = 16_000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


def test_warnings_are_their_rows(tmp_path: Path, checkpoint: Path) -> None:
    """Protects: that an answer is about half of a clip is said beside it, at every row and beside an error, too, also
    where sound is what is cut off, which another thread reads, or the file's name is no UTF-8."""
    pages = tmp_path / "pages\udcff.tiff"
    Image.new("RGB", (56, 56)).save(pages, save_all=True, append_images=[Image.new("RGB", (56, 56))])
    media = [str(pages), cut_sound(tmp_path / "a.flac"), str(pages)]
    rows: list[dict[str, Any]] = [{"id": number, "media": media, "question": f"{number}?"} for number in range(2)]
    rows += [{"id": "wrong", "media": [*media, "gone.png"], "question": "?"}, {"id": "whole", "question": "?"}]
    rows += [{"id": "long", "media": media, "question": "?", "max_new_tokens": 10**6}]
    given = options(checkpoint, write(tmp_path / "q.jsonl", *rows))
    prepare, answer = PrepareWorker(given, ALONE, set()), ModelReplica(given, ALONE)
    source = Source(given.questions)
    source.scan()
    made = [prepare(row) for row in one_by_one(source.rows(Tables, source.groups()))]
    table = pyarrow.table({name: [value for one in made for value in one[name]] for name in ("row", "tensors")})
    journal = Journal(tmp_path / "a.parquet")
    journal.write(answer(table)["answer"])
    journal.finish()
    found = {row["id"]: row for row in pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()}
    assert found["0"]["text"] is not None and found["long"]["error"]
    for id in ("0", "1", "long"):
        sound, picture = sorted(found[id]["warnings"])
        assert sound.startswith(f"{tmp_path}/a.flac is cut off: it promises a sound of 4.0 s and has ")
        assert picture == f"{tmp_path}/pages\\udcff.tiff has 2 pages: the first is taken."
    assert "gone.png" in found["wrong"]["error"]
    assert found["whole"]["warnings"] is None
    assert {json.loads(row["command"])["max_new_tokens"] for row in found.values()} == {5}


def test_on_ray(tmp_path: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every row once, also when the run goes on from what an earlier one wrote, and where groups of them are about the
    same; then nothing is left to do."""
    pytest.importorskip("ray")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (56, 56), "red" if name == "a.png" else "blue").save(tmp_path / name)
    rows: list[dict[str, Any]] = [
        {"id": number, "media": [None, "a.png", "b.png"][number % 3], "question": f"Question {number}?"}
        for number in range(12)
    ]
    gone = {"id": "gone", "media": "gone.png", "question": "?"}
    cut = {"id": "cut", "media": cut_sound(tmp_path / "a.flac"), "question": "?"}
    questions = write(tmp_path / "q.jsonl", *rows, "{broken", gone, cut)
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"id": 3, "text": "from before"}\n{"id": 4, "te')
    command = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "3", "--batch", "4"]
    assert main([*command, str(questions), str(answers)]) == 0
    found = read(answers)
    assert found.keys() == {*range(12), "line 13", "gone", "cut"}
    assert found[3]["text"] == "from before"
    assert [each for each in found if "error" in found[each]] == ["line 13", "gone"]
    assert [each for each in found if "warnings" in found[each]] == ["cut"]
    said = capfd.readouterr().err
    assert "14 rows" in said and "2 of them errors, 1 with warnings; 1 were there before" in said
    assert main([*command, str(questions), str(answers)]) == 0
    assert "0 rows" in capfd.readouterr().err
    assert main([*command, "--seed", "5", str(questions), str(answers)]) == 1
    assert "--seed was not given, and now it is 5" in capfd.readouterr().err
    assert read(answers) == found
    asked = found[0]["command"]
    assert (asked["model"], asked["max_new_tokens"], asked["retention"]) == (str(checkpoint), 3, 0.35)
    assert all(found[each]["command"] == asked for each in found if each != 3)


def test_what_fits_no_row_is_said_first(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = write(tmp_path / "q.jsonl", {"id": 1, "media": None, "question": "?"})
    command = ["--model", str(checkpoint), str(questions), str(tmp_path / "a.jsonl")]
    assert main(["--method", "fastv", "--retention", "0.1", *command]) == 1
    assert capsys.readouterr().err.startswith("omni-batch: token selection cannot run: FastV cannot keep")
    assert main(["--batch", "0", *command]) == 1
    assert not (tmp_path / "a.jsonl").exists()


def test_a_second_run_is_refused(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects: two runs into one file lose and double answers; what is there stays as it is."""
    questions = write(tmp_path / "q.jsonl", {"id": 1, "media": None, "question": "?"}, "{broken")
    answers = write(tmp_path / "a.jsonl", {"id": 1, "text": "x"})
    with only_run(answers):
        assert main(["--model", str(checkpoint), str(questions), str(answers)]) == 1
    assert "a.jsonl is being written by another run" in capsys.readouterr().err
    assert read(answers).keys() == {1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "nosuch"], "device 'nosuch' cannot be used here (Expected one of cpu"),
        (["--device", "xpu"], "device 'xpu' cannot be used here ("),
        (["--device", "cuda:1"], "a replica sees one GPU, which is cuda, not cuda:1: choose GPUs by CUDA_VISIBLE_"),
        (["--device", "cuda"], "each replica takes a GPU, and there are 0: lower --replicas, or try --device cpu."),
        (["--device", "cuda", "--replicas", "2"], "each replica takes a GPU, and there are 0"),
        (["--adapter", "/nosuch"], "'/nosuch' is neither an existing folder nor a hub id"),
    ],
)
def test_what_no_replica_can_use_is_said_first(
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    """Protects: before Ray starts, and not in its traceback."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    questions = write(tmp_path / "q.jsonl", {"id": 1, "media": None, "question": "?"})
    assert main(["--model", str(checkpoint), *arguments, str(questions), str(tmp_path / "a.jsonl")]) == 1
    assert capsys.readouterr().err.startswith(f"omni-batch: {said}")
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("broken", ["tokenizer.json", "config.json", "memory"])
def test_a_process_that_cannot_start_tells_why(
    tmp_path: Path, checkpoint: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: where a node's own files are at fault, or its memory, the sentence comes to the run."""
    given = options(checkpoint, write(tmp_path / "q.jsonl", {"id": 1, "media": None, "question": "?"}))
    prepare, answer = PrepareWorker(given, ALONE, set()), ModelReplica(given, ALONE)
    if broken == "memory":

        def full(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(batch_module, "load", full)
        answer, expected = ModelReplica(given, ALONE), OUT_OF_MEMORY
    else:
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint, folder)
        (folder / broken).write_text("[]")
        given.model = str(folder)
        prepare, expected = PrepareWorker(given, ALONE, set()), broken
    made = prepare(pyarrow.Table.from_pylist([{"id": 1, "media": None, "question": "?"}]))
    (line,) = map(json.loads, answer(pyarrow.table(made))["answer"])
    assert expected in line["unusable"] and "id" not in line


def test_on_ray_it_is_a_sentence(tmp_path: Path, checkpoint: Path) -> None:
    """An adapter without weights, which the replica finds. Ray twice in one process may end it."""
    pytest.importorskip("ray")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "target_modules": []}')
    questions = write(tmp_path / "q.jsonl", {"id": 1, "media": None, "question": "?"})
    command = ["--model", str(checkpoint), "--device", "cpu", "--adapter", str(tmp_path / "adapter")]
    words = [sys.executable, "-m", "omni.batch", *command, str(questions), str(tmp_path / "a.jsonl")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "adapter_model.safetensors is absent" in done.stderr.rpartition("\nomni-batch: ")[2]
    assert not (tmp_path / "a.jsonl").exists()


def test_no_cluster_is_said(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nSome advice.")

    monkeypatch.setattr(ray, "init", refuse)
    questions = write(tmp_path / "q.jsonl", {"id": 1, "media": None, "question": "?"})
    assert main(["--address", "auto", "--model", str(checkpoint), str(questions), str(tmp_path / "a.jsonl")]) == 1
    said = "omni-batch: no Ray cluster at auto (Could not find any running Ray instance). Start one"
    assert capsys.readouterr().err.startswith(said)


OPEN = os.environ | {"RAY_AUTH_MODE": "disabled"}
"""Ray 2.60 wants a token of whoever joins a cluster at an address, where the user has one."""


def batch(folder: Path, *arguments: str) -> str:
    """Runs it with a small checkpoint beside the questions, everything under relative paths; its last line."""
    command = [sys.executable, "-m", "omni.batch", "--model", "checkpoint", "--max-new-tokens", "3", *arguments]
    done = subprocess.run(command, cwd=folder, env=OPEN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_cluster_needs_its_address_alone(tmp_path: Path, checkpoint: Path, clip: Path) -> None:
    """Parquet to Parquet, on a node whose working directory is another; beside it a run on this machine alone."""
    from pyarrow import parquet

    (tmp_path / "checkpoint").symlink_to(checkpoint)
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    media = ["clip.mp4", "clip.mp4", "gone.mp4"]
    rows = [{"id": str(number), "media": each, "question": f"What? {number}"} for number, each in enumerate(media)]
    write(tmp_path / "q.jsonl", *rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    start = "start --head --block --num-cpus 8 --port 6399 --include-dashboard false".split()
    (tmp_path / "elsewhere").mkdir()
    arguments = ["--address", "127.0.0.1:6399", "--decoders", "1", "--replicas", "1", "--cores", "1"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", *start]
    node = subprocess.Popen(ray, cwd=tmp_path / "elsewhere", env=OPEN, stdout=subprocess.DEVNULL)
    try:
        assert "3 rows in" in batch(tmp_path, *arguments, "q.parquet", "a.parquet")
        assert "3 rows in" in batch(tmp_path, "q.jsonl", "a.jsonl")
    finally:
        node.terminate()
        node.wait()
    found = {row["id"]: row for row in parquet.read_table(tmp_path / "a.parquet").to_pylist()}
    assert found.keys() == {"0", "1", "2"} and found["2"]["error"] and len(found["0"]["tokens"]) == 3


@pytest.mark.parametrize("link", ["", "hard", "soft", "partial", "dots", "folder"])
def test_questions_are_not_written_over(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], link: str
) -> None:
    """By their own name or another, with a last line that has no end."""
    pytest.importorskip("ray")
    name = "a.partial.jsonl" if link == "partial" else "q.jsonl"
    questions = tmp_path / name
    questions.write_text('{"id": 1, "question": "?"}\n{"id": 2, "question": "?"}')
    (tmp_path / "linked").symlink_to(tmp_path)
    known = {"": questions, "partial": tmp_path / "a.parquet", "folder": tmp_path / "linked" / name}
    known["dots"] = tmp_path / "linked" / ".." / tmp_path.name / name
    answers = known.get(link, tmp_path / "a.jsonl")
    if link == "hard":
        answers.hardlink_to(questions)
    elif link == "soft":
        answers.symlink_to(questions)
    before = questions.read_bytes()
    assert main(["--model", str(checkpoint), str(questions), str(answers)]) == 1
    assert "would be written over" in capsys.readouterr().err
    assert questions.read_bytes() == before
