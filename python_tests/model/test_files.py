"""What a killed process leaves, made by hand: found, finished or removed, and named."""

import os
import time

import pytest
import tiny

from k2kernels.model import K2Config, K2Model, files
from k2kernels.model.convert import convert


def leave(folder, purpose="saving", host=files.HOST):
    path = folder / f"{files.PREFIX}{purpose}-{host}-0123abcd"
    path.mkdir()
    (path / "shard-0").write_text("part of one")
    return path


def interrupted(path):
    """A save into `path` that is killed before the first rename."""
    save = tiny.model("deepseek")
    folder, descriptor = files.new_folder(path)
    save.save_pretrained(path.with_name("other"))
    for file in path.with_name("other").iterdir():
        file.rename(folder / file.name)
    folder = files.begin_exchange(folder, [file.name for file in path.iterdir() if file.is_file()])
    os.close(descriptor)
    return folder


def test_leftovers_are_removed_and_named(tmp_path):
    model, out = tiny.model("kimi"), tmp_path / "out"
    gone = leave(tmp_path)
    with pytest.warns(UserWarning, match=rf"{gone}: removed; a save that was killed had left it"):
        model.save_pretrained(out)
    inside = leave(out)
    with pytest.warns(UserWarning, match=str(inside)):
        model.save_pretrained(out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "out"]


def test_an_empty_directory_with_a_leftover_is_empty(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    tiny.model("kimi").save_pretrained(src)
    dst.mkdir()
    leave(dst)
    with pytest.warns(UserWarning, match="removed"):
        convert(src, dst, "fp8", progress=False)
    with pytest.raises(ValueError, match=r"got .*dst, which holds config\.json, model\.safetensors"):
        convert(src, dst, "fp8", progress=False)


def test_what_lives_stays(tmp_path, recwarn):
    """A save under way, and one of another host, unless it has been still for an hour."""
    live, descriptor = files.new_folder(tmp_path)
    young, old = leave(tmp_path, host="elsewhere"), leave(tmp_path, host="longago")
    os.utime(old, (time.time() - 4000,) * 2)
    files.remove_leftovers(tmp_path)
    assert live.exists() and young.exists() and not old.exists() and len(recwarn) == 1
    os.close(descriptor)
    files.remove_leftovers(tmp_path)
    assert not live.exists() and young.exists()


def test_a_folder_without_config_json_is_made_whole_by_loading(tmp_path):
    out = tmp_path / "out"
    tiny.model("kimi").save_pretrained(out, max_shard_size=100_000)
    folder = interrupted(out)
    assert K2Config.from_pretrained(out).n_routed_experts == 8  # the old one, whole
    (out / "config.json").rename(folder / files.OLD / "config.json")
    with pytest.warns(UserWarning, match=rf"{folder}: a save was killed while it replaced .* finished now"):
        assert K2Model.from_pretrained(out, progress=False).config.n_routed_experts == 16
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}


def test_a_save_that_had_not_begun_to_replace_is_taken_back(tmp_path):
    out = tmp_path / "out"
    tiny.model("kimi").save_pretrained(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    folder = interrupted(out)
    with pytest.warns(UserWarning, match=rf"{folder}: removed; .* which is as it was"):
        files.finish_exchange(out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_exchange_of_another_process_is_named(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    folder = leave(out, "replacing", host="elsewhere")
    with pytest.raises(
        FileNotFoundError, match=rf"no config\.json in {out}; a save was interrupted .*: {folder} holds"
    ):
        K2Config.from_pretrained(out)


def test_a_failed_return_keeps_the_old_files(tmp_path, monkeypatch):
    """Renames fail and fail again on the way back: the old checkpoint is not deleted with the new one."""
    out, rename = tmp_path / "out", os.rename
    tiny.model("kimi").save_pretrained(out)
    calls = iter(range(100))

    def fail(source, target):
        if str(target).startswith(str(out)) and files.PREFIX in str(source) + str(target) and next(calls) > 3:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        tiny.model("deepseek").save_pretrained(out)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="finished now"):
        assert K2Model.from_pretrained(out, progress=False).config.n_routed_experts == 16
