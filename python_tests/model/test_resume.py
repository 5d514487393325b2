"""Conversions that were interrupted: what is kept, what is begun afresh, and what is told. `test_kills` kills them."""

import fcntl
import json
import os
import shutil

import pytest
import tiny
import torch
from checkpoints import read

from k2kernels.cli import main
from k2kernels.model import files, resume, shards
from k2kernels.model.convert import convert

SHARD = 150_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, and what becomes of it without interruption."""
    path = tmp_path_factory.mktemp("made")
    model = tiny.model("kimi", num_hidden_layers=2, moe_intermediate_size=64).to(torch.bfloat16)
    model.save_pretrained(path / "src", max_shard_size=SHARD)
    for to in ("fp8", "int4", "mxfp4"):
        convert(path / "src", path / to, to, progress=False, max_shard_size=SHARD // 3)
    return path


@pytest.fixture
def src(made, tmp_path):
    return shutil.copytree(made / "src", tmp_path / "src")


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def hidden(path):
    return [file for file in path.iterdir() if file.name.startswith(files.PREFIX)]


def interrupt(monkeypatch, after, error=KeyboardInterrupt):
    """The next shard but `after` is half written when its process is interrupted."""
    save, count = shards.save_file, iter(range(10**6))

    def stop(tensors, file, **more):
        if next(count) == after:
            file.write_bytes(b"half")
            raise error
        save(tensors, file, **more)

    monkeypatch.setattr(shards, "save_file", stop)


def interrupted(monkeypatch, src, dst, to="fp8", after=2, **options):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after)
        with pytest.warns(UserWarning, match=rf"holds {after} of \d+ shards; the same conversion to .* will go on"):
            convert(src, dst, to, progress=False, max_shard_size=SHARD // 3, **options)
    (folder,) = hidden(dst if dst.is_dir() else dst.parent)
    return folder


def written(monkeypatch, *arguments, **options):
    """How many shards a conversion writes."""
    save, calls = shards.save_file, []
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", lambda *a, **k: (calls.append(a), save(*a, **k)))
        convert(*arguments, **{"progress": False, "max_shard_size": SHARD // 3, **options})
    return len(calls)


@pytest.mark.parametrize("to", ["fp8", "int4", "mxfp4"])
@pytest.mark.parametrize("there", [False, True])
def test_goes_on_behind_whole_shards(made, src, tmp_path, monkeypatch, capfd, to, there):
    dst, total = tmp_path / "dst", len(list((made / to).glob("model-*")))
    if there:
        dst.mkdir()
    folder = interrupted(monkeypatch, src, dst, to)
    assert (folder / "part").read_bytes() == b"half" and folder.parent == (dst if there else tmp_path)
    capfd.readouterr()
    assert written(monkeypatch, src, dst, to, progress=True) == total - 2
    assert f"resumed: 2 of {total} shards were there\n" in capfd.readouterr().err
    assert contents(dst) == contents(made / to)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]


def test_interrupted_twice(made, src, tmp_path, monkeypatch):
    interrupted(monkeypatch, src, tmp_path / "dst")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        interrupt(patch, 1, OSError(28, "No space left on device"))
        with pytest.warns(UserWarning, match=r"holds 3 of \d+ shards"):
            convert(src, tmp_path / "dst", "fp8", progress=False, max_shard_size=SHARD // 3)
    assert written(monkeypatch, src, tmp_path / "dst", "fp8") == len(list((made / "fp8").glob("model-*"))) - 3
    assert contents(tmp_path / "dst") == contents(made / "fp8")


def other_bytes(src):
    """Of the same size."""
    tensors, file = read(src), min(src.glob("model-*"))
    name = min(name for name in shards.scan(src) if shards.scan(src)[name].file == file)
    held = {n: tensors[n] for n, info in shards.scan(src).items() if info.file == file}
    shards.save_file({**held, name: held[name] + 1}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, to, options, what",
    [
        (lambda src: os.utime(src / "config.json"), "fp8", {}, "with another source"),
        (other_bytes, "fp8", {}, "with another source"),
        (None, "int4", {}, "with another set of options"),
        (None, "fp8", dict(scale_fmt="ue8m0"), "with another set of options"),
        (None, "fp8", dict(max_shard_size=SHARD), "with another set of options"),
    ],
)
def test_another_conversion_is_begun_afresh(src, tmp_path, monkeypatch, change, to, options, what):
    dst = tmp_path / "dst"
    folder = interrupted(monkeypatch, src, dst)
    if change:
        change(src)
    with pytest.warns(UserWarning, match=rf"{folder}: removed; a conversion {what} had left it; begun afresh"):
        written(monkeypatch, src, dst, to, **options)
    convert(src, tmp_path / "want", to, progress=False, **{"max_shard_size": SHARD // 3, **options})
    assert contents(dst) == contents(tmp_path / "want") and hidden(tmp_path) == []


def cut(folder):
    file = folder / "shard-1"
    file.write_bytes(file.read_bytes()[:-1])


def swap(folder):
    (folder / "shard-1").write_bytes((folder / "shard-0").read_bytes())


@pytest.mark.parametrize(
    "damage, kept",
    [
        (cut, 1),
        (swap, 1),
        (lambda folder: (folder / "shard-0").unlink(), 0),
        (lambda folder: (folder / "shard-1").rename(folder / "shard-7"), 1),
        (lambda folder: (folder / "extra").mkdir(), 2),
        (lambda folder: (folder / resume.ORIGIN).write_text("{"), 0),
    ],
)
def test_what_is_not_whole_is_made_again(made, src, tmp_path, monkeypatch, recwarn, damage, kept):
    damage(interrupted(monkeypatch, src, tmp_path / "dst"))
    total = len(list((made / "fp8").glob("model-*")))
    assert written(monkeypatch, src, tmp_path / "dst", "fp8") == total - kept
    assert contents(tmp_path / "dst") == contents(made / "fp8") and hidden(tmp_path) == []


def test_killed_behind_the_last_shard(made, src, tmp_path, monkeypatch):
    """Shards that have their last names already are kept; without their origin they are not trusted."""
    rename, total = os.rename, len(list((made / "fp8").glob("model-*")))
    for name, kept in (("model-00003", total), ("dst", 0)):

        def stop(source, target, name=name):
            if os.path.basename(target).startswith(name):
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "rename", stop)
            patch.setattr(resume.ResumableWriter, "_kept_after", lambda *_: True)  # as a kill
            convert(src, tmp_path / "dst", "fp8", progress=False, max_shard_size=SHARD // 3)
        if kept:
            assert written(monkeypatch, src, tmp_path / "dst", "fp8") == 0
        else:
            with pytest.warns(UserWarning, match="a conversion of which nothing is known had left it; begun afresh"):
                assert written(monkeypatch, src, tmp_path / "dst", "fp8") == total
        assert contents(tmp_path / "dst") == contents(made / "fp8") and hidden(tmp_path) == []
        shutil.rmtree(tmp_path / "dst")


def test_two_at_once(src, tmp_path, monkeypatch, capsys):
    folder = interrupted(monkeypatch, src, tmp_path / "dst")
    before = contents(folder)
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert main(["convert", str(src), str(tmp_path / "dst"), "--to", "fp8"]) == 2
    error = capsys.readouterr().err
    assert f"another process converts to it, in {folder}; wait for it, or remove that folder if there is none" in error
    assert contents(folder) == before
    os.close(other)


def test_other_targets_and_saves_leave_it_alone(src, tmp_path, monkeypatch):
    """What is saved under its name removes it."""
    folder = interrupted(monkeypatch, src, tmp_path / "dst")
    before = contents(folder)
    convert(src, tmp_path / "dst2", "fp8", progress=False)
    tiny.model("kimi").save_pretrained(tmp_path / "saved")
    assert contents(folder) == before
    with pytest.warns(UserWarning, match=rf"{folder}: removed; a conversion that was killed had left it"):
        tiny.model("kimi").save_pretrained(tmp_path / "dst")
    assert hidden(tmp_path) == []


def test_a_target_made_meanwhile(src, tmp_path, monkeypatch):
    folder = interrupted(monkeypatch, src, tmp_path / "dst")
    (tmp_path / "dst").mkdir()
    with pytest.warns(UserWarning, match=rf"{folder}: removed"):
        convert(src, tmp_path / "dst", "fp8", progress=False)
    assert hidden(tmp_path) == [] and json.loads((tmp_path / "dst" / "config.json").read_text())


def test_damage_in_the_source_keeps_nothing(src, tmp_path):
    """The message would come again; once the source is repaired, it is another one."""
    tensors = read(src)
    last = max(tensors)
    tensors[last].view(-1)[0] = torch.nan
    other = {n: tensors[n] for n, info in shards.scan(src).items() if info.file == shards.scan(src)[last].file}
    shards.save_file(other, shards.scan(src)[last].file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must hold finite numbers"):
        convert(src, tmp_path / "dst", "fp8", progress=False, max_shard_size=10_000)
    assert hidden(tmp_path) == []
