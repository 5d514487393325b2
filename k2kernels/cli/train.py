"""Train a small Kimi-K2 on text with MuonClip.

Without --text the text is CPython's own language reference. The run leaves in --out a Hugging Face-style checkpoint
(config.json, model.safetensors, tokenizer.json), loss.png, max_logits.png, history.jsonl (one line per step), and the
checkpoints from which --resume continues after an interrupt.

torchrun --nproc-per-node N -m k2kernels train ... shares the sequences of a step out over N processes: the losses are
those of one. A run may be resumed on another number of processes.

With --w4 the routed experts are quantised to 4 bits in each pass, by the op that serves them: the checkpoint in --out,
in 4 bits, has the logits of the trained model.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

MAX_THREADS = 1024


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--text", nargs="+", default=[], metavar="FILE", help="UTF-8 text files to learn")
    add("--out", required=True, metavar="DIR", help="directory of the run")
    add("--steps", type=int, default=600)
    add("--config", default="tiny", metavar="PRESET|DIR", help="preset, or directory with config.json (default: tiny)")
    add("--from", dest="start", metavar="DIR", help="start from a checkpoint's weights and tokenizer, at a lower --lr")
    add("--optimizer", default="muonclip", help="muonclip, muon (no clip) or adamw")
    add("--fp8", action="store_true", help="FP8 products in linear layers and experts (weights stay as they are)")
    add("--w4", metavar="KIND", help="int4 or mxfp4: train the routed experts for 4 bits, in which they are then saved")
    add("--dtype", help="float32 or bfloat16, of the weights (default: float32; bfloat16 with --w4)")
    add("--resume", action="store_true", help="continue the run in --out, if there is one; --steps may be more")
    add("--batch-size", type=int, default=16, help="sequences per step")
    add("--length", type=int, default=128, help="tokens per sequence")
    add("--lr", type=float, default=0.02, help="learning rate of the matrices (Muon)")
    add("--adamw-lr", type=float, default=3e-3, help="learning rate of everything else")
    add("--threshold", type=float, default=30.0, help="QK-clip threshold on the largest scaled logit")
    add("--fim-rate", type=float, metavar="RATE", help="fraction of sequences whose middle is moved to the end")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=50, metavar="STEPS")
    add("--ep", type=int, default=1, metavar="RANKS", help="under torchrun: processes that share the experts")
    add("--no-fsdp", action="store_true", help="under torchrun: every process keeps all weights but the experts'")
    add("--checkpoint-activations", action="store_true", help="under torchrun: recompute layers in the backward pass")
    add("--device", default="cpu", help="cpu, cuda, ...; under torchrun cuda is a GPU for each process")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="under torchrun: for a process that is late")
    add("--threads", type=int, help="CPU threads (1: a resumed run is equal bit for bit)")


def run(options: argparse.Namespace) -> int:
    import torch

    from k2kernels.parallel.launch import launched
    from k2kernels.train.trainer import Trainer, TrainOptions, only_run  # after the arguments: it imports much

    if options.threads is not None:
        if not 1 <= options.threads <= MAX_THREADS:
            raise ValueError(f"--threads must be from 1 to {MAX_THREADS}, got {options.threads}")
        torch.set_num_threads(options.threads)
    if not options.out:
        raise ValueError("--out must name a directory, got an empty name")
    if not options.timeout > 0:
        raise ValueError(f"--timeout must be above 0, got {options.timeout}")
    if options.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {options.save_every}")
    names = ("config", "start", "optimizer", "steps", "batch_size", "length", "lr", "adamw_lr", "threshold", "seed")
    given = {name: getattr(options, name) for name in (*names, "fp8", "w4", "dtype", "fim_rate")}
    chosen = TrainOptions(text=tuple(options.text), **given)
    with (
        launched(ep=options.ep, device=options.device, timeout=options.timeout) as ranks,
        only_run(Path(options.out), ranks),
    ):
        trainer = Trainer(
            chosen,
            Path(options.out),
            resume=options.resume,
            save_every=options.save_every,
            ranks=ranks,
            fsdp=not options.no_fsdp,
            checkpoint_activations=options.checkpoint_activations,
        )
        return _train(trainer)


def _train(trainer) -> int:
    import torch

    chosen, first = trainer.options, trainer.step
    parameters = sum(p.numel() for p in trainer.model.parameters())
    corpus = trainer.corpus
    say = print if trainer.ranks.first else lambda *_, **__: None
    say(
        f"{parameters / 1e6:.2f} M parameters, {chosen.optimizer}{chosen.products}, "
        f"{len(corpus.train)} tokens of text "
        f"({corpus.train_bytes_per_token:.2f} bytes each), {len(corpus.valid)} held out"
        + (f"; {trainer.ranks.world_size} processes" if trainer.ranks.world_size > 1 else "")
        + (f"; continuing after step {first}" if first else "")
    )
    if trainer.device.type == "cpu" and torch.cuda.is_available():
        say("training on the CPU; --device cuda takes the GPU of this machine", file=sys.stderr)
    started = time.perf_counter()
    _loop(trainer)
    if trainer.stopped:
        say(f"\nstopped after step {trainer.step}, saved; --resume continues", file=sys.stderr)
        return 130
    trainer.finish()
    valid = next(row.valid for row in reversed(trainer.history) if row.valid is not None)
    say(
        f"held-out text: {valid:.3f} bits/byte (xz -9e on the whole text: {trainer.xz:.3f}); "
        f"{chosen.steps - first} steps in {time.perf_counter() - started:.0f} s\n"
        f"wrote {trainer.out}: checkpoint, tokenizer, loss.png, max_logits.png, history.jsonl"
    )
    return 0


def _loop(trainer) -> None:
    """Runs to the end, or to the end of the step in which Ctrl-C or SIGTERM came."""
    from tqdm import tqdm

    from k2kernels.model.shards import on_terminal

    def ask_to_stop(number: int, _) -> None:
        if trainer.stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once; torchrun adds a SIGTERM to the first
        trainer.stop = True

    former = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    first = trainer.ranks.first
    terminal = first and on_terminal()
    clips = sum(row.clipped_heads for row in trainer.history)
    bar = tqdm(
        total=trainer.options.steps,
        initial=trainer.step,
        unit="step",
        dynamic_ncols=True,
        disable=not terminal,
        bar_format="{percentage:3.0f}%|{bar:10}| {remaining} left{postfix}",
    )
    try:
        for row in trainer.run():
            clips += row.clipped_heads
            line = (
                f"loss {row.loss:.3f}, {row.bits_per_byte:.2f} bits/byte, max logit {row.max_logit:.1f}, "
                f"{clips} clips, load {row.expert_load:.1f}x, {row.tokens_per_second:.0f} tokens/s"
            )
            bar.set_postfix_str(line, refresh=False)
            bar.update()
            valid = "" if row.valid is None else f" | held out: {row.valid:.3f} bits/byte"
            if terminal:
                if valid:
                    tqdm.write(f"step {row.step}{valid}", file=sys.stderr)
            elif first and (valid or row.step % 25 == 0):  # a log file: a line now and then
                print(f"step {row.step}/{trainer.options.steps}: {line}{valid}", file=sys.stderr, flush=True)
    finally:
        bar.close()
        for number, handler in former.items():
            signal.signal(number, handler)
