"""kill -9 at random times of `save_pretrained`, `convert` and `train`, and a second run right after each.

    python python_tests/kill_checks.py save|exchange|convert|resume|train KILLS FOLDER

A process of its own: each attempt is forked from it, so that nothing is imported again.
"""

import functools
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from k2kernels.cli import main
from k2kernels.model import K2Config, K2Model, files, shards
from k2kernels.model.checkpoint import from_pretrained, save_pretrained
from k2kernels.model.convert import convert
from k2kernels.parallel import checkpoint_info
from k2kernels.train.data import read_text
from k2kernels.train.trainer import CHECKPOINTS, HISTORY_FILE

sys.path.insert(0, str(Path(__file__).parent / "model"))
import tiny

SHARD = 250_000  # bytes: the small models have several
DRAWS = random.Random(0)


def forked(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os._exit(work() or 0)
        except BaseException:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Killer:
    """Kills runs of a work at random times. One that ended before its kill makes the next kills come earlier:
    the first run, which is timed, may be far slower than the later ones.
    """

    def __init__(self, work) -> None:
        started = time.perf_counter()
        assert ended(forked(work)) == 0
        self.most, self.hits = time.perf_counter() - started, 0

    def __call__(self, work) -> None:
        pid = forked(work)
        time.sleep(DRAWS.uniform(0, self.most))
        os.kill(pid, signal.SIGKILL)
        if ended(pid) == -signal.SIGKILL:
            self.hits += 1
        else:
            self.most *= 0.7


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(f"{files.PREFIX}*")]


def filled(number: float) -> K2Model:
    """A model whose every weight is the number."""
    model = tiny.model("kimi")
    with torch.no_grad():
        for p in model.state_dict().values():
            p.fill_(number)
    return model


def number_of(path: Path) -> float:
    """The number that all weights are; loading must succeed."""
    found = {float(x) for p in from_pretrained(K2Model, path, progress=False).state_dict().values() for x in p.unique()}
    assert len(found) == 1, f"a mixture: {found}"
    return found.pop()


def save(kills: int, folder: Path) -> None:
    """Over a checkpoint of one file or of several: the old or the new one, whole; nothing stays of the killed save."""
    out, models = folder / "out", [filled(i) for i in range(3)]
    sizes = [5 * 10**9, SHARD]
    save_pretrained(models[0], out)
    now, attempt = 0.0, 0
    kill = Killer(lambda: save_pretrained(models[0], out, max_shard_size=SHARD))
    while kill.hits < kills:
        new = 1 + attempt % 2
        work = functools.partial(save_pretrained, models[new], out, max_shard_size=sizes[attempt // 2 % 2])
        kill(work)
        assert number_of(out) in (now, new)
        save_pretrained(models[new], out, max_shard_size=sizes[DRAWS.randrange(2)])
        assert number_of(out) == (now := float(new)) and leftovers(folder) == []
        attempt += 1


def exchange(kills: int, folder: Path) -> None:
    """Killed behind each rename of an exchange in turn: the next load, or save, finds one of the two, whole.

    `kills` is the most renames.
    """
    models, rename = [filled(1), filled(2)], os.rename
    for before, after in ((SHARD, 10**9), (10**9, SHARD)):
        for dies in range(kills):
            out = folder / f"{before}-{after}-{dies}"
            save_pretrained(models[0], out, max_shard_size=before)

            def work(out=out, dies=dies, after=after):
                calls = iter(range(10**6))

                def stop(*names):
                    rename(*names)
                    if next(calls) == dies:
                        os.kill(os.getpid(), signal.SIGKILL)

                os.rename = stop
                save_pretrained(models[1], out, max_shard_size=after)

            code = ended(forked(work))
            if dies % 2:  # else a load comes first
                save_pretrained(models[1], out, max_shard_size=before)
                assert number_of(out) == 2.0 and leftovers(out) == []
            else:
                assert number_of(out) in (1.0, 2.0)
                save_pretrained(models[0], out)
                assert number_of(out) == 1.0 and leftovers(out) == []
            if code == 0:
                break
        assert code == 0 and dies > 4  # the last attempt had fewer renames than it would have survived


def conversions(kills: int, folder: Path) -> None:
    """Into a new folder, or an empty one: the source is as it was, the rerun works, nothing is left."""
    src = folder / "src"
    save_pretrained(tiny.model("kimi"), src, max_shard_size=SHARD)
    before = {file.name: file.read_bytes() for file in src.iterdir()}
    kill, attempt = Killer(lambda: convert(src, folder / "first", "fp8", progress=False, max_shard_size=SHARD)), 0
    whole = {file.name: file.read_bytes() for file in (folder / "first").iterdir()}
    while kill.hits < kills:
        dst = folder / f"dst{attempt}"
        if attempt % 2:
            dst.mkdir()
        kill(functools.partial(convert, src, dst, "fp8", progress=False, max_shard_size=SHARD))
        seen = {file.name: file.read_bytes() for file in dst.iterdir() if file.is_file()} if dst.is_dir() else {}
        assert "config.json" not in seen or seen == whole
        if "config.json" not in seen:
            convert(src, dst, "fp8", progress=False, max_shard_size=SHARD)
        assert {file.name: file.read_bytes() for file in dst.iterdir()} == whole and leftovers(folder) == []
        assert {file.name: file.read_bytes() for file in src.iterdir()} == before
        attempt += 1


def resumed(kills: int, folder: Path) -> None:
    """Killed before each rename of a conversion in turn: the next one writes the other shards, and the same bytes.

    `kills` is the most renames. Into a new folder and an empty one, in turn.
    """
    src, rename, save_file = folder / "src", os.rename, shards.save_file
    save_pretrained(tiny.model("kimi", num_hidden_layers=2), src, max_shard_size=SHARD)
    to_fp8 = functools.partial(convert, to="fp8", progress=False, max_shard_size=SHARD // 4)
    to_fp8(src, folder / "first")
    whole = {file.name: file.read_bytes() for file in (folder / "first").iterdir()}
    count = len(list((folder / "first").glob("model-*")))
    for dies in range(kills):
        dst, finished, written = folder / f"dst{dies}", folder / "finished", folder / "written"
        finished.touch()
        written.touch()
        if dies % 2:
            dst.mkdir()

        def work(dst=dst, dies=dies, finished=finished):
            calls = iter(range(10**6))

            def stop(source, target):
                if next(calls) == dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(source, target)
                if Path(target).name.startswith("shard-"):
                    finished.open("a").write("x")

            os.rename = stop
            to_fp8(src, dst)

        def again(dst=dst, written=written):
            def counted(*args, **more):
                save_file(*args, **more)
                written.open("a").write("x")

            shards.save_file = counted
            to_fp8(src, dst)

        code = ended(forked(work))
        seen = {file.name: file.read_bytes() for file in dst.iterdir() if file.is_file()} if dst.is_dir() else {}
        assert "config.json" not in seen or seen == whole
        if code != 0 and "config.json" not in seen:
            if dst.is_dir() and any(dst.glob(f"{files.PREFIX}replacing-*")):  # the next reader finishes it
                K2Config.from_pretrained(dst)
            else:
                assert ended(forked(again)) == 0
                there, again_written = finished.stat().st_size, written.stat().st_size
                unknown = (
                    there == count == again_written
                )  # killed between the last two steps, when nothing tells the origin
                assert again_written == count - there or unknown
        assert {file.name: file.read_bytes() for file in dst.iterdir()} == whole and leftovers(folder) == []
        finished.unlink()
        written.unlink()
        if code == 0:
            break
    assert code == 0 and dies > count


def train(kills: int, folder: Path) -> None:
    """Steps are never lost, the history is the checkpoint's, and the next run is not refused."""
    text = folder / "text.txt"
    text.write_text(read_text([])[:40_000])
    out, step, hits = folder / "run", 0, 0
    arguments = ["train", "--out", str(out), "--text", str(text), "--threads", "1", "--save-every", "1", "--resume"]
    arguments += ["--batch-size", "1", "--length", "16", "--steps", str(10 * kills)]
    for _ in range(kills):
        pid = forked(lambda: main(arguments))
        deadline = time.monotonic() + 60
        while step_of(out) == step and time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.005)
        time.sleep(DRAWS.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        hits += ended(pid) == -signal.SIGKILL
        now = step_of(out)
        assert now > step, "a killed run took steps with it, or the next one was refused"
        step = now
        state = checkpoint_info(out / CHECKPOINTS)
        assert state["step"] == step == len(state["extra"]["history"])
        behind = len((out / HISTORY_FILE).read_text().splitlines()) if (out / HISTORY_FILE).exists() else 0
        assert behind in (step - 1, step)
    stop = forked(lambda: main(arguments))  # the run after the last kill, ended properly
    while step_of(out) == step:
        time.sleep(0.01)
    os.kill(stop, signal.SIGTERM)
    assert ended(stop) == 130
    state = checkpoint_info(out / CHECKPOINTS)
    lines = (out / HISTORY_FILE).read_text().splitlines()
    assert lines == [json.dumps(row) for row in state["extra"]["history"]]
    assert leftovers(folder) == []
    assert hits == kills


def step_of(out: Path) -> int:
    try:
        return int((out / CHECKPOINTS / "latest").read_text().strip().removeprefix("step_").partition(".")[0])
    except (FileNotFoundError, NotADirectoryError):
        return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what was written outlives a kill, though not a power failure
    what = {"save": save, "exchange": exchange, "convert": conversions, "resume": resumed, "train": train}[sys.argv[1]]
    what(int(sys.argv[2]), Path(sys.argv[3]))
    print("whole")
