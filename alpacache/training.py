"""Stage two: train the action expert from cached prefixes. The VLM is never loaded.

One plain loop. Its state is (weights, optimizer, step) and every random number is a function of the seed and a place in
the global order, so a run that was killed and resumed ends with the same bits as one that was not.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpacache import flow_matching, randomness
from alpacache.alpamayo import ActionExpert, Checkpoint, load_expert
from alpacache.cached_dataset import BatchLoader, CachedDataset, TrainingItem, target
from alpacache.config import TrainConfig, to_toml
from alpacache.device import resolve_device
from alpacache.errors import InterruptedRunError, NonFiniteError, UsageError
from alpacache.identity import model_identity
from alpacache.interrupt import InterruptGuard
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.run_directory import RunCheckpoint, RunDirectory, read_checkpoint

_NON_FINITE_LIMIT = 3
_VAL_DRAWS = 4
_FREE_TO_CHANGE = {
    "resume",
    "out",
    "device",
    "keep",
    "save_every",
    "val_every",
    "val",
    "val_samples",
    "in_memory",
    "stores",
    "model",
}
"""Config keys that do not change what a step computes; `stores` and `model` may move, their identity is checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a run of stage two did."""

    run: str
    steps: int
    samples: int
    """Distinct samples in the stores."""
    first_loss: float | None
    """Mean over this call's first steps (up to 20); None if there was nothing left to do."""
    last_loss: float | None
    """Mean over its last steps."""
    val_loss: float | None
    best_val_loss: float | None
    seconds: float
    samples_per_s: float
    data_wait: float
    """Share of the time spent waiting for data."""
    peak_gib: float | None
    """Peak reserved GPU memory."""


def train(config: TrainConfig, *, on_progress: OnProgress = ignore) -> TrainReport:
    """Train until the configured step; saves on the way, at the end, and when a signal asks to stop."""
    directory = RunDirectory(config.out)
    if directory.steps and not config.resume:
        raise UsageError(
            f"{config.out} already holds a run (step {directory.steps[-1]}); pass --resume to go on, or choose "
            "another --out."
        )
    device = resolve_device(config.device)
    checkpoint = Checkpoint(config.model)
    data = CachedDataset(config.stores, checkpoint, in_memory=config.in_memory)
    val = CachedDataset([config.val], checkpoint, in_memory=config.in_memory) if config.val else None
    expert = load_expert(checkpoint, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    run = _Run(config, directory, checkpoint, data, val, expert, on_progress)
    if directory.steps:
        run.restore()
    else:
        directory.write_config(to_toml(config))
        directory.rewind_metrics(0)
    return run.loop()


class _Run:
    """The state of a run: weights, optimizer, step."""

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        checkpoint: Checkpoint,
        data: CachedDataset,
        val: CachedDataset | None,
        expert: ActionExpert,
        on_progress: OnProgress,
    ) -> None:
        self.config, self.directory, self.checkpoint = config, directory, checkpoint
        self.data, self.val, self.expert, self.on_progress = data, val, expert, on_progress
        self.total = config.steps or math.ceil((config.epochs or 0) * len(data) / config.batch_size)
        self.warmup = min(100, self.total // 10) if config.warmup is None else config.warmup
        if self.warmup >= self.total:
            raise UsageError(
                f"warmup is {self.warmup} of {self.total} steps; expected fewer, so that lr is ever reached."
            )
        self.parameters = trainable_parameters(expert, config.trainable)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=expert.device.type == "cuda",
        )
        self.step = 0
        self.best: dict[str, Any] = {"step": None, "val_loss": None}
        self.losses: list[float] = []
        self.val_loss: float | None = None
        self.bad_steps = 0

    def loop(self) -> TrainReport:
        config, started, first = self.config, time.monotonic(), self.step
        loader = BatchLoader(self.data, self.expert.action_space, self._places())
        if self.expert.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.expert.device)
        self.expert.train()
        with InterruptGuard() as guard:
            for items in loader:
                row = self._train_step(items)
                self.step += 1
                seconds = time.monotonic() - started
                rate = (self.step - first) / seconds
                row |= {"samples_per_s": rate * config.batch_size, "data_wait": loader.waited_s / seconds}
                if self.val is not None and (self.step % config.val_every == 0 or self.step == self.total):
                    row["val_loss"] = self.val_loss = self._validate()
                self.directory.append_metrics(row)
                self._tell(row, rate)
                finished = self.step == self.total
                improved = "val_loss" in row and (self.best["step"] is None or row["val_loss"] < self.best["val_loss"])
                if improved:
                    self.best = {"step": self.step, "val_loss": row["val_loss"]}
                if improved or finished or guard.requested or self.step % config.save_every == 0:
                    self._save(is_best=improved)
                if guard.requested and not finished:
                    raise InterruptedRunError(
                        f"stopped on request at step {self.step}; saved. Run again with --resume to go on."
                    )
        return self._report(first, time.monotonic() - started, loader.waited_s)

    def restore(self) -> None:
        """Go on from the newest checkpoint; refuses a changed setting that would change the result."""
        path = self.directory.checkpoint(self.directory.steps[-1])
        content = read_checkpoint(path, optimizer=True)
        before, now = content.state["settings"], self._settings()
        changed = [
            f"{key}: the run has {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]
        ]
        if changed:
            raise UsageError(
                f"{self.config.out} was begun with other settings:\n  "
                + "\n  ".join(changed)
                + "\nRepeat them, or choose another --out."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(content.model[name])
        self._restore_optimizer(content.optimizer)
        self.step = content.state["step"]
        self.best = content.state["best"]
        self.directory.rewind_metrics(self.step)

    def _train_step(self, items: Sequence[TrainingItem]) -> dict[str, Any]:
        config = self.config
        lr = learning_rate(self.step, total=self.total, warmup=self.warmup, peak=config.lr, final=config.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        action = torch.stack([item.action for item in items])[:, None]
        noise = torch.stack([randomness.noise(config.seed, item.position, draws=config.draws) for item in items])
        t = torch.stack(
            [randomness.times(config.seed, item.position, draws=config.draws, schedule=config.times) for item in items]
        )
        loss = self._loss(action, noise, t, [item.prefix for item in items])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        row: dict[str, Any] = {"step": self.step + 1, "loss": float(loss.detach()), "lr": lr, "grad_norm": float(norm)}
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.optimizer.step()
            self.losses.append(row["loss"])
            self.bad_steps = 0
            return row
        self.bad_steps += 1
        row |= {"loss": None, "grad_norm": None, "skipped": [item.sample_id for item in items]}
        if self.bad_steps >= _NON_FINITE_LIMIT:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.bad_steps} steps in a row, last at step {self.step + 1} "
                f"with {', '.join(row['skipped'])}; none was applied. Lower --lr, or check those samples with "
                "`alpacache verify --deep`."
            )
        return row

    def _loss(self, action: Tensor, noise: Tensor, t: Tensor, prefixes: Sequence[Any]) -> Tensor:
        """Mean over samples and draws; `action [B, 1, 64, 2]`, `noise [B, K, 64, 2]`, `t [B, K]`."""
        device = self.expert.device
        action, noise, t = action.to(device), noise.to(device), t.to(device)
        velocity = self.expert.velocity(
            flow_matching.interpolate(action, noise, t), t, prefixes, causal=self.config.causal
        )
        return flow_matching.loss(velocity, action, noise).mean()

    @torch.no_grad()
    def _validate(self) -> float:
        """Loss over at most `val_samples` held-out samples, evenly spread, on noise that never changes."""
        if self.val is None:
            raise AssertionError("validation without a store")
        self.expert.eval()
        count = min(len(self.val), self.config.val_samples)
        indices = [place * len(self.val) // count for place in range(count)]
        total = 0.0
        for start in range(0, count, self.config.batch_size):
            samples = [self.val.load(index) for index in indices[start : start + self.config.batch_size]]
            action = torch.stack([target(sample, self.expert.action_space) for sample in samples])[:, None]
            noise = torch.stack([randomness.noise("val", sample.sample_id, draws=_VAL_DRAWS) for sample in samples])
            t = torch.stack(
                [randomness.times("val", s.sample_id, draws=_VAL_DRAWS, schedule=self.config.times) for s in samples]
            )
            total += float(self._loss(action, noise, t, [sample.prefix for sample in samples])) * len(samples)
        self.expert.train()
        return total / count

    def _places(self) -> Iterator[list[tuple[int, int]]]:
        """(position, sample index) of each remaining batch."""
        order = randomness.GlobalOrder(self.config.seed, len(self.data))
        size = self.config.batch_size
        for step in range(self.step, self.total):
            yield [(position, order[position]) for position in range(step * size, (step + 1) * size)]

    def _save(self, *, is_best: bool) -> None:
        state = {
            "settings": self._settings(),
            "base": model_identity(self.checkpoint),
            "best": self.best,
            "trainable": self.config.trainable,
        }
        content = RunCheckpoint(
            model={name: parameter.detach() for name, parameter in self.parameters.items()},
            optimizer=self._optimizer_tensors(),
            state=state,
        )
        self.directory.save(self.step, content, keep=self.config.keep, keep_also=self.best["step"])
        if is_best:
            self.directory.point("best", self.step)

    def _settings(self) -> dict[str, Any]:
        """What must not change over a resume, as plain JSON."""
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _FREE_TO_CHANGE}
        settings["betas"] = list(self.config.betas)
        return {**settings, "dataset_samples": len(self.data), "base": model_identity(self.checkpoint)}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {f"{key}.{name}": value for name, p in self.parameters.items() for key, value in state[p].items()}

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(
                    "cpu" if key == "step" and not self.optimizer.defaults["fused"] else parameter.device
                )
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }

    def _tell(self, row: dict[str, Any], rate: float) -> None:
        notes = {"loss": "skipped" if row["loss"] is None else f"{row['loss']:.4f}", "wait": f"{row['data_wait']:.0%}"}
        if "val_loss" in row:
            notes["val"] = f"{row['val_loss']:.4f}"
        self.on_progress(Progress(done=self.step, total=self.total, unit="steps", rate=rate, notes=notes))

    def _report(self, first: int, seconds: float, waited_s: float) -> TrainReport:
        done = self.step - first
        device = self.expert.device
        window = max(1, min(20, len(self.losses) // 2))
        return TrainReport(
            run=self.config.out,
            steps=self.step,
            samples=len(self.data),
            first_loss=_mean(self.losses[:window]),
            last_loss=_mean(self.losses[-window:]),
            val_loss=self.val_loss,
            best_val_loss=self.best["val_loss"],
            seconds=seconds,
            samples_per_s=done * self.config.batch_size / seconds if seconds else 0.0,
            data_wait=waited_s / seconds if seconds else 0.0,
            peak_gib=torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None,
        )


def learning_rate(step: int, *, total: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up from `peak / warmup`, then a cosine that reaches `final` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - 1 - warmup)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def trainable_parameters(expert: ActionExpert, which: str) -> dict[str, torch.nn.Parameter]:
    """Parameters to train, by public state-dict name; all others stop needing gradients.

    `all` is expert and projections; `head` the two projections and the expert's final norm.
    """
    chosen = {}
    for name, parameter in expert.named_parameters():
        parameter.requires_grad_(
            which == "all" or name.startswith(("action_in_proj.", "action_out_proj.", "expert.norm."))
        )
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
