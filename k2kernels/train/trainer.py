"""The training loop: a pure function of its options and the step, so that a resumed run repeats the curve.

Over the ranks of torchrun each has its share of the sequences of a step; the losses are those of one process, up to the
order of sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from k2kernels.model import K2Config, K2Model
from k2kernels.model.files import lock, replace_file
from k2kernels.optim import MuonClip, QKClip
from k2kernels.parallel import Layout, checkpoint_info, load_checkpoint, parallelize, save_checkpoint
from k2kernels.parallel.launch import ALONE, Launched
from k2kernels.train.data import (
    FIM_TOKENS,
    TOKENIZERS,
    Corpus,
    read_text,
    read_tokenizer,
    train_tokenizer,
    xz_bits_per_byte,
)
from k2kernels.train.plots import plot_loss, plot_max_logits

OPTIMIZERS = ("muonclip", "muon", "adamw")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
W4_KINDS = ("int4", "mxfp4")
WARMUP_STEPS = 10
DECAY_FRACTION = 0.5  # of the steps, at the end, over which the learning rates fall linearly to zero
BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments
VALIDATION_TOKENS = 4096  # in one pass
CHECKPOINTS = "checkpoints"
HISTORY_FILE = "history.jsonl"
# Beside the weights of a checkpoint that a run starts from: its tokenizer, its turns, where a text ends.
COPIED = (
    *(*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "tokenization_kimi.py"),
    *("chat_template.jinja", "generation_config.json"),
)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options of a run. Sizes in tokens, rates per step."""

    text: tuple[str, ...] = ()  # files; none: CPython's language reference
    config: str = "tiny"  # a preset's name, or a directory with a config.json
    start: str | None = None  # a checkpoint's directory with its tokenizer: its weights, instead of random ones
    optimizer: str = "muonclip"
    steps: int = 600
    batch_size: int = 16
    length: int = 128
    lr: float = 0.02  # of the matrices, by Muon
    adamw_lr: float = 3e-3  # of everything else (of everything, with optimizer "adamw")
    threshold: float = 30.0  # of QK-clip, on the scaled logits
    bias_rate: float = 1e-2  # of the router's loss-free balancing
    sequence_loss: float = 1e-4  # weight of the router's sequence-wise balance loss
    fp8: bool = False  # products of linear layers and experts
    w4: str | None = None  # "int4" or "mxfp4": the kind to which routed experts are quantised in each pass
    dtype: str | None = None  # of the weights: "float32" or "bfloat16"; None: bfloat16 with w4, else float32
    seed: int = 0
    fim_rate: float | None = None  # the fraction of sequences that become prefix, suffix, middle

    def __post_init__(self) -> None:
        if self.start is not None and self.config != "tiny":
            raise ValueError(f"--config must be left out with --from, which has its own, got {self.config!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.w4 not in (None, *W4_KINDS):
            raise ValueError(f"--w4 must be one of {', '.join(W4_KINDS)}, got {self.w4!r}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.w4 and self.dtype == "float32":
            raise ValueError("--dtype must be bfloat16 with --w4, whose products are those of bfloat16, got 'float32'")
        if self.w4 and self.fp8:
            raise ValueError("--w4 and --fp8 are two ways to multiply by the experts' weights: give one of them")
        if self.torch_dtype == torch.bfloat16 and self.optimizer == "adamw":
            raise ValueError(
                "--optimizer must be muonclip or muon, which keep float32 master weights, for bfloat16 weights "
                f"({'--w4' if self.w4 else '--dtype bfloat16'}), got 'adamw'"
            )
        for name in ("steps", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.fim_rate is not None and not (0 < self.fim_rate <= 1 and self.length >= 8):
            raise ValueError(
                f"--fim-rate must be above 0 and at most 1, with a --length of 8 or more, got {self.fim_rate} and "
                f"{self.length}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be from 0 to {2**31 - 1}, got {self.seed}")
        for name in ("lr", "adamw_lr", "threshold"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.dtype or ("bfloat16" if self.w4 else "float32")]

    @property
    def products(self) -> str:
        """What is unusual about the products, as words to append."""
        dtype = ", bfloat16" if self.torch_dtype == torch.bfloat16 else ""
        return f"{dtype}{', FP8 products' if self.fp8 else ''}{f', {self.w4.upper()} experts' if self.w4 else ''}"


@dataclasses.dataclass
class Row:
    """The measurements of one step. `valid` (bits per byte of the held-out text) only where it was measured."""

    step: int  # counted from 1
    loss: float  # nats per token
    bits_per_byte: float
    max_logits: dict[int, float]  # per layer, before the step's clip
    clipped_heads: int
    expert_load: float  # of the busiest expert of any layer, over the mean
    tokens_per_second: float
    valid: float | None = None

    @property
    def max_logit(self) -> float:
        return max(self.max_logits.values(), default=-math.inf)


class Trainer:
    """Trains a K2 model on text, and saves in `out` all that is needed to resume.

    Args:
        options: what to train.
        out: directory of the run.
        resume: continue from the last save in `out`, if there is one.
        save_every: steps between saves.
        ranks: what `k2kernels.parallel.launch.launched` gives; a run may be resumed on others. Everything here is then
            collective: every rank does the same.
        fsdp, checkpoint_activations: as in `k2kernels.parallel.parallelize`, over several ranks.

    Attributes:
        stop: set on any rank (by a signal), it ends `run` after the present step, which is saved.
        stopped: whether it did.

    Raises:
        ValueError: for bad options or text, or when `out` holds a run that other options made.
        FileExistsError: when `out` holds a run and `resume` is off.
        NotADirectoryError: when `out` is a file.
    """

    def __init__(
        self,
        options: TrainOptions,
        out: Path,
        *,
        resume: bool = False,
        save_every: int = 50,
        ranks: Launched = ALONE,
        fsdp: bool = True,
        checkpoint_activations: bool = False,
    ):
        self.options, self.out, self.save_every, self.ranks, self.fsdp = options, Path(out), save_every, ranks, fsdp
        self.stop = self.stopped = False
        if options.batch_size % ranks.world_size:
            raise ValueError(
                f"--batch-size must be a multiple of the {ranks.world_size} processes, got {options.batch_size}"
            )
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"--out {self.out}: must be a directory, got a file")
        self.device = _device(ranks.device)
        text = read_text([Path(p) for p in options.text])
        self.identity = {**dataclasses.asdict(options), "text": hashlib.sha256(text.encode()).hexdigest()}
        state = self._load_state(resume)

        config = _config(options.config if options.start is None else options.start)
        if options.length > config.max_position_embeddings:
            raise ValueError(f"--length must be at most {config.max_position_embeddings}, got {options.length}")
        fim = () if options.fim_rate is None else FIM_TOKENS
        if options.start is not None:
            self.tokenizer = read_tokenizer(Path(options.start).expanduser(), config.vocab_size)
            if missing := [token for token in fim if self.tokenizer.token_to_id(token) is None]:
                raise ValueError(
                    f"--fim-rate needs a tokenizer with {', '.join(fim)}, got none of {', '.join(missing)}"
                )
        else:
            self.tokenizer = train_tokenizer(text, config.vocab_size, fim)
            # A text of few words gives fewer tokens; ids without one would be sampled.
            config = dataclasses.replace(config, vocab_size=self.tokenizer.get_vocab_size())
        self.corpus = Corpus.encode(text, self.tokenizer, fim_rate=options.fim_rate)
        if len(self.corpus.train) <= options.length:
            raise ValueError(f"--length {options.length} needs more text: it has {len(self.corpus.train)} tokens")
        self.xz = xz_bits_per_byte(text)

        torch.manual_seed(options.seed)
        if options.start is None:
            self.model = K2Model(config).to(options.torch_dtype)
        else:
            self.model = K2Model.from_pretrained(options.start, dtype=options.torch_dtype, progress=False)
        if ranks.mesh is None:
            self.model.to(self.device)
        self.model.train().use_fp8(options.fp8).use_w4(options.w4, pack_once=True)
        self.model.use_sequence_loss(options.sequence_loss or None)
        self.layout = None
        if ranks.mesh is not None:
            self.layout = Layout(ranks.mesh)
            tokens = options.length * max(options.batch_size // ranks.world_size, self._validation_windows)
            parallelize(
                self.model, self.layout, max_tokens=tokens, fsdp=fsdp, checkpoint_activations=checkpoint_activations
            )
        self.optimizer = self.make_optimizer()
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[Row] = []
        if state is not None:
            load_checkpoint(self.out / CHECKPOINTS, self.model, self.optimizer)
            self.history = [Row(**row) for row in state["history"]]

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history)

    def run(self) -> Iterator[Row]:
        """Does the remaining steps, or those until `stop`, one per iteration; saves on the way and at the end."""
        self.out.mkdir(parents=True, exist_ok=True)  # so that an error occurs before the first step
        if self.history:  # a kill between the checkpoint and the history leaves the latter behind
            self._write_history()
        validate_every = max(1, self.options.steps // 6)
        while self.step < self.options.steps:
            row = self._train_step(self.step)
            if row.step % validate_every == 0 or row.step == self.options.steps:
                row.valid = self.validate()
            self.history.append(row)
            ends = self.step == self.options.steps
            self.stopped &= not ends
            if self.step % self.save_every == 0 or ends or self.stopped:
                self.save()
            yield row
            if self.stopped:
                return

    def _train_step(self, step: int) -> Row:
        started = time.perf_counter()
        o = self.options
        inputs, targets = self.corpus.batch(step, size=o.batch_size, length=o.length, seed=o.seed)
        tokens = inputs.numel()
        mine = (ids.chunk(self.ranks.world_size)[self.ranks.rank] for ids in (inputs, targets))
        inputs, targets = (ids.to(self.device) for ids in mine)
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()  # with the gradient of the balance loss
        nats, stops = self._sums(loss.item() / self.ranks.world_size, self.stop)
        self.stopped = stops > 0
        if self.layout is not None:
            if not self.fsdp:
                self.layout.reduce_gradients(self.model)
            self.layout.reduce_statistics(self.model)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr):
            group["lr"] = lr * self._lr_factor(step)
        max_logits = {layer: float(heads.max()) for layer, heads in self.model.max_logits().items()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.reset_max_logits()
        load = self.model.expert_load()
        self.model.update_router_bias(o.bias_rate)
        return Row(
            step=step + 1,
            loss=nats,
            bits_per_byte=nats / math.log(2) / self.corpus.train_bytes_per_token,
            max_logits=max_logits,
            clipped_heads=self._clipped_heads(),
            expert_load=max((float(counts.max() / counts.mean()) for counts in load.values()), default=1.0),
            tokens_per_second=tokens / (time.perf_counter() - started),
        )

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte of the held-out text."""
        inputs, targets = (ids.to(self.device) for ids in self.corpus.validation_windows(self.options.length))
        self.model.eval()
        passes = list(zip(inputs.split(self._validation_windows), targets.split(self._validation_windows)))
        nats = 0.0
        for first in range(0, len(passes), self.ranks.world_size):
            mine = first + self.ranks.rank
            x, y = passes[min(mine, len(passes) - 1)]  # a rank without a pass takes part, and its result is dropped
            total = float(F.cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction="sum"))
            nats += total if mine < len(passes) else 0.0
        self.model.train()
        (nats,) = self._sums(nats)
        return nats / inputs.numel() / math.log(2) / self.corpus.valid_bytes_per_token

    @property
    def _validation_windows(self) -> int:
        """In one pass."""
        return max(1, VALIDATION_TOKENS // self.options.length)

    def _sums(self, *values: float) -> list[float]:
        """Over the ranks."""
        return list(values) if self.layout is None else self.layout.sums(values)

    def save(self) -> None:
        """Writes the state from which a run resumes; a crash during this leaves the previous one."""
        history = [dataclasses.asdict(row) for row in self.history]
        extra = {"identity": self.identity, "history": history}
        save_checkpoint(self.out / CHECKPOINTS, self.model, self.optimizer, self.step, extra=extra)
        self._write_history()

    def _write_history(self) -> None:
        if self.ranks.first:
            lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in self.history)
            replace_file(self.out / HISTORY_FILE, lambda file: file.write(lines.encode()))

    def finish(self) -> None:
        """Writes the results of a finished run: checkpoint, tokenizer, pictures.

        With `w4` the experts are saved in 4 bits, as they were trained to be served; the weights that training would
        continue from are in the checkpoints for `resume`.
        """
        self.model.save_pretrained(self.out, format=self.options.w4)
        if not self.ranks.first:
            return
        o, steps = self.options, [row.step for row in self.history]
        if o.start is None:
            text = self.tokenizer.to_str(pretty=True)
            replace_file(self.out / "tokenizer.json", lambda file: file.write(text.encode()))
        for name in COPIED if o.start else ():
            if (file := Path(o.start).expanduser() / name).is_file():
                content = file.read_bytes()
                replace_file(self.out / name, lambda new, content=content: new.write(content))
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        title = f"{o.optimizer}{o.products}, {size:.2f} M parameters"
        valid = [(row.step, row.valid) for row in self.history if row.valid is not None]
        plot_loss(self.out / "loss.png", steps, [row.bits_per_byte for row in self.history], valid, self.xz, title)
        layers = {layer: [row.max_logits[layer] for row in self.history] for layer in self.history[0].max_logits}
        threshold = o.threshold if o.optimizer == "muonclip" else None
        plot_max_logits(self.out / "max_logits.png", steps, layers, threshold, title)

    def make_optimizer(self) -> torch.optim.Optimizer:
        o = self.options
        if o.optimizer == "adamw":
            # Without foreach: it cannot mix parameters on different meshes.
            options = dict(betas=(0.9, 0.95), weight_decay=0.1, foreach=False if self.layout else None)
            return torch.optim.AdamW(self.model.parameters(), o.adamw_lr, **options)
        clip = QKClip(threshold=o.threshold) if o.optimizer == "muonclip" else None
        adamw = dict(lr=o.adamw_lr, betas=(0.9, 0.95), weight_decay=0.1)
        return MuonClip(self.model, o.lr, adamw=adamw, qk_clip=clip, mesh=self.layout)

    def _clipped_heads(self) -> int:
        if self.options.optimizer != "muonclip":
            return 0
        return sum(int((clip.gamma < 1).sum()) for clip in self.optimizer.last_clip.values())

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to zero."""
        decay = max(1, round(DECAY_FRACTION * self.options.steps))
        return min(1.0, (step + 1) / WARMUP_STEPS, (self.options.steps - step) / decay)

    def _load_state(self, resume: bool) -> dict[str, Any] | None:
        path = self.out / CHECKPOINTS
        try:
            found = checkpoint_info(path)
        except ValueError as error:
            raise ValueError(f"--resume: {error}; remove {path} to start over") from error
        if found is None:
            return None
        if not resume:
            raise FileExistsError(f"--out {self.out}: holds a run already; --resume continues it, or name another")
        state, identity = found["extra"], found["extra"]["identity"]
        differing = [k for k in self.identity if identity.get(k) != self.identity[k]]
        if self.options.steps > identity["steps"]:  # a longer run: from here on with the rates of its length
            differing.remove("steps")
        if differing:
            what = ", ".join(f"{k} was {identity.get(k)!r}, is {self.identity[k]!r}" for k in differing)
            raise ValueError(f"--resume: the run in {self.out} had other options: {what}")
        return state


@contextlib.contextmanager
def only_run(out: Path, ranks: Launched = ALONE) -> Iterator[None]:
    """Keeps other runs out of the directory `out` for the block: rank 0 holds it locked. Collective.

    Without a lock where the file system has none.

    Raises:
        BlockingIOError: on every rank, when another process holds it.
    """
    out, made, descriptor, fault = Path(out), False, None, None
    if ranks.first and (out.is_dir() or not out.exists()):
        with contextlib.suppress(OSError):  # the run will say what is wrong with the directory
            made = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            descriptor = lock(out)
            if descriptor is None:
                fault = (
                    f"--out {out}: another run is at work in this directory, and two would overwrite each other's "
                    "files; wait until it has ended, or name another directory"
                )
    fault = ranks.gather(fault)[0]
    if fault is not None:
        raise BlockingIOError(fault)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                out.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _device(device: torch.device) -> torch.device:
    """The device, if it is there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # without a driver, or PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one of this machine, got {str(device)!r} ({reason})") from error


def _config(name: str) -> K2Config:
    """The configuration of a preset or a directory, if its training fits into this machine's memory."""
    config = (
        K2Config.from_pretrained(name) if Path(name).expanduser().is_dir() or "/" in name else K2Config.preset(name)
    )
    needed = BYTES_PER_PARAMETER * config.parameter_counts()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"--config {name}: must fit into this machine's {memory / 2**30:.0f} GiB, got a model whose training needs "
            f"{needed / 2**30:.0f} GiB and activations"
        )
    return config
