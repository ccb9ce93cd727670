"""One run's folder, as every method script writes it: args.json, metrics.jsonl, checkpoint.pt, result.json."""

import contextlib
import io
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from kernels.contract import fail, load_weights, one_line, ran_on
from kernels.distributed import least_of_all


def quiet_interruption(kind, error, trace):
    """Stands in for sys.excepthook: one line for Ctrl-C, whose exit code Python still makes that of the signal."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted; --resume continues from the last checkpoint, if there is one", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def newest_whole(paths):
    """The first of the checkpoints that can be read, and what it holds; refuses where none can."""
    *paths, last = (path for path in paths if path.exists())
    for path in paths:
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            return path, load_weights(path)
        print(f"{path} is damaged: continuing from {last.name}")
        path.unlink()  # the next one written may not push it over the whole one
    return last, load_weights(last)


def not_finite(state):
    """The name of the first tensor in nested dicts and lists that holds a NaN or an infinity; empty where none does.

    >>> not_finite({"a": [torch.ones(2)], "b": {"c": torch.tensor([1.0, torch.nan])}})
    'b c'
    """
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, torch.Tensor):
            if not value.isfinite().all():
                return str(name)
        elif isinstance(value, (dict, list, tuple)) and (found := not_finite(value)):
            return f"{name} {found}"
    return ""


class RunFolder:
    """Base of a script's Run, which adds `state` (what its checkpoint holds) and `restore` (the way back).

    Rows of metrics.jsonl, the seconds spent and the state of the generator of random numbers are kept here. A
    checkpoint is written beside the last one and renamed, and the last but one is kept: whenever a run is killed, a
    whole checkpoint is there, and should the newest be damaged, --resume takes the one before. A full disk and an
    interruption from the keyboard end in one line.

    Args:
        args: the script's Args; read are out, resume, seed and device.
        setting: the method's values, derived from args; they stand in args.json and result.json.
        free: options that a continued run may change; all others must be those of args.json.
        clears: files of an earlier run, besides checkpoint.pt and result.json, which may not pass for this one's.
        rank: which of torchrun's processes this is; each but the first has a folder of its own, rankN, in --out.
    """

    def __init__(self, args, setting, free=(), clears=("student.pt", "samples.png", "curve.png"), rank=0):
        self.args, self.setting, self.start, self.lines = args, setting, time.time(), []
        self.out = Path(args.out) / f"rank{rank}" if rank else Path(args.out)
        self.rng = torch.cuda if args.device == "cuda" else torch  # whose default generator draws the noise
        self.options, self.free = asdict(args) | {"setting": setting}, ("resume", "out", "data_dir", "smoke", *free)
        self.checkpoints = [self.out / "checkpoint.pt", self.out / "checkpoint-previous.pt"]
        sys.excepthook = quiet_interruption
        with one_line(f"--out {self.out} cannot be used", "pass another folder"):
            self.out.mkdir(parents=True, exist_ok=True)
            if args.resume and any(path.exists() for path in self.checkpoints):
                path, saved = newest_whole(self.checkpoints)
                with one_line(f"{path}: no checkpoint of this script", "run without --resume"):
                    self._continue(saved)
            else:
                for name in ("result.json", *(path.name for path in self.checkpoints), *clears):
                    (self.out / name).unlink(missing_ok=True)
            (self.out / "result.json").unlink(missing_ok=True)  # its presence says that a run is complete
            (self.out / "args.json").write_text(json.dumps(self.options, indent=1) + "\n")
            (self.out / "metrics.jsonl").write_text("".join(self.lines))  # forgets what came after the checkpoint

    def state(self):
        """What the checkpoint holds besides: tensors, numbers, strings, and lists and dicts of them."""
        raise NotImplementedError

    def restore(self, saved):
        """Take back what `state` gave; raise on what does not fit."""
        raise NotImplementedError

    def _continue(self, saved):
        before, now = json.loads(saved["options"]), json.loads(json.dumps(self.options))
        if changed := ", ".join(k for k in now if k not in self.free and before[k] != now[k]):
            fail(f"--resume: {changed} differ from the first run's (args.json); repeat its options")
        self.lines, self.start = saved["lines"], time.time() - saved["seconds"]
        self.restore(saved["state"])
        self.rng.set_rng_state(saved["rng"])

    def step_back(self):
        """Go back to the checkpoint before the newest."""
        with one_line(f"{self.checkpoints[1]}: no checkpoint of this script", "run without --resume"):
            self._continue(load_weights(self.checkpoints[1]))
            (self.out / "metrics.jsonl").write_text("".join(self.lines))

    def meet(self, n_done):
        """Processes that step together were perhaps not stopped together: all go on from the slowest one's checkpoint.

        n_done: function that says how many steps are done here.
        """
        if n_done() > least_of_all(n_done(), self.args.device):
            self.step_back()
        if least_of_all(-n_done(), self.args.device) != -n_done():
            fail("--resume: the processes' checkpoints are of different steps; run without --resume")

    def write(self, row):
        """Add a row to metrics.jsonl; returns its figures as short strings."""
        self.lines.append(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")
        with self.written("metrics.jsonl"), open(self.out / "metrics.jsonl", "a") as file:
            file.write(self.lines[-1])
        return {k.split("/")[-1]: f"{v:.4g}" for k, v in row.items()}

    def column(self, name):
        """All values of one figure, from the rows that have it."""
        return [row[name] for row in map(json.loads, self.lines) if name in row]

    def show(self, bar, row):
        """`write`, and the figures beside the progress bar; as a line of their own where there is no terminal."""
        bar.set_postfix(shown := self.write(row))
        if bar.disable:
            print("  ".join(f"{k} {v:>8}" for k, v in shown.items()), flush=True)

    def written(self, name):
        """Around whatever writes a file: a full disk ends the run in one line."""
        return one_line(f"{self.out / name} cannot be written", "free some space, then continue with --resume")

    def save(self):
        """Write checkpoint.pt; the one before becomes checkpoint-previous.pt. Refuses to keep what is not finite."""
        saved = dict(lines=self.lines, options=json.dumps(self.options), state=self.state())
        if broken := not_finite(saved["state"]):
            fail(f"not finite: {broken} of the run's state; in another --out, lower the learning rates or weights")
        saved |= dict(rng=self.rng.get_rng_state(), seconds=time.time() - self.start)
        part, (newest, previous) = self.out / "checkpoint.part", self.checkpoints
        with self.written("checkpoint.pt"):
            try:
                with open(part, "wb") as file:
                    torch.save(saved, file)
                    file.flush()
                    os.fsync(file.fileno())  # a rename may reach the disk before what it names
            except Exception:
                part.unlink(missing_ok=True)
                raise
            if newest.exists():
                os.replace(newest, previous)
            os.replace(part, newest)  # nobody sees half a checkpoint

    def save_student(self, student, teacher, method, dataset, accuracy):
        """Write student.pt, described as teacher.py's checkpoints are; student, teacher: load_network's."""
        saved = dict(format=1, arch=student.arch, dataset=dataset, method=method, seed=self.args.seed)
        saved |= {k: getattr(teacher, k) for k in ("num_classes", "image_size", "mean", "std")}
        saved.update(channels=len(teacher.mean), accuracy=accuracy)
        with self.written("student.pt"):
            torch.save(saved | {"state_dict": student.model.state_dict()}, self.out / "student.pt")

    def finish(self, result):
        """Write result.json, the last file of a run: `result`, seconds, seed, setting, device and versions."""
        result |= dict(seconds=round(time.time() - self.start, 1), seed=self.args.seed, setting=self.setting)
        with self.written("result.json"):
            (self.out / "result.json").write_text(json.dumps(result | ran_on(self.args.device), indent=1) + "\n")
        print(f"wrote result.json into {self.out}; {result['seconds']:.0f} s")
