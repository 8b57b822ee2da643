"""The driver: what is trained, driving. Frames and poses of this moment in, paths out; no store and no future.

    moment_of: a sample  ->  VLM: its prefix  ->  expert: flow steps from noise  ->  action space: paths

Each part is the one that extraction and evaluation use, and keys and values are rounded to bfloat16 as a store holds
them: from the same noise, a moment gives the paths that `eval` predicts for it. On a GPU the VLM's layers are compiled,
all flow steps are one CUDA graph, and memory is asked for while the first call of a kind warms up, not in later ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt import ROUTE_TOKENS
from alpacache.cached_samples.features import CachedSample
from alpacache.cached_samples.ring import Batch, PrefixRows
from alpacache.driver.arguments import camera_names, counts, noise_draws, whole
from alpacache.driver.moment import pose_at, track_of_poses
from alpacache.driver.observer import FRAMES, Observer, SeenMoment, as_stored
from alpacache.driver.weights import check_holds_vlm, open_vlm
from alpacache.driving.cameras import (
    changes_of,
    prompt_marks,
    recorded_and_blank,
    sort_cameras,
)
from alpacache.driving.poses import Track
from alpacache.driving.sample import STEP_US, Floats
from alpacache.errors import DeviceMemoryError, NonFiniteError, UsageError
from alpacache.gpu.device import cap_memory, enter, has_kernels, resolve_device
from alpacache.inference.prediction import ActionSampler, after_rollouts, eval_noise, sampled, to_paths
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.prefix import PrefixFeatures, Tail
from alpacache.training.trained_expert import find_trained, load_trained

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

MOST_FRAMES = 4
_KEPT_GRAPHS = 4
"""Combinations of paths and flow steps that a driver keeps ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrivenPaths:
    """K paths from one moment on, and the actions they come from."""

    times_us: NDArray[np.int64]
    """`[64]` the instants (us) of the waypoints, 0.1 s apart, the first 0.1 s after the moment."""
    xyz: NDArray[np.float32]
    """`[K, 64, 3]` metres, ego frame at the moment (x forward, y left)."""
    rot: NDArray[np.float32]
    """`[K, 64, 3, 3]` vehicle to that frame."""
    actions: NDArray[np.float32]
    """`[K, 64, 2]` normalised acceleration and curvature, as the expert gives them."""
    controls: NDArray[np.float32]
    """`[K, 64, 2]` the same in m/s^2 and 1/m, left positive."""
    position_m: Floats
    """`[3]` place of the ego frame in the world of the given poses."""
    rotation: Floats
    """`[3, 3]` vehicle to world at the moment."""
    texts: tuple[str, ...] = ()
    """Text that the VLM reasoned before each path; empty without reasoning."""

    def in_world(self) -> tuple[Floats, Floats]:
        """Positions `[K, 64, 3]` (m) and rotations `[K, 64, 3, 3]` in the world of the given poses."""
        xyz = self.xyz.astype(np.float64) @ self.rotation.T + self.position_m
        return xyz, self.rotation @ self.rot.astype(np.float64)


class Driver:
    """A model that drives: an observer, and one expert that plans from what it sees.

    Calls must come from one thread at a time. `alongside` makes further drivers of the same observer, so that one look
    serves several experts.
    """

    def __init__(
        self,
        observer: Observer,
        expert: "ActionExpert",
        *,
        capture: bool = True,
        compiled: bool = False,
        trained: Mapping[str, Any] | None = None,
        changes: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            observer: the frozen VLM, its prompt, and the cameras that it sees.
            expert: on the VLM's device.
            capture: on a GPU, replay flow steps as a CUDA graph; the same kernels without.
            compiled: on a GPU, let torch.compile fuse the small operations of the expert's layers.
            trained: record of the checkpoint's files that the expert has in it.
            changes: what was done to the pictures that a run was trained on since they were recorded; None: unknown.
        """
        self.observer, self.checkpoint = observer, observer.checkpoint
        self.trained, self.changes = trained, changes
        self._expert, self._capture = expert, capture
        self._compiled = compiled and expert.device.type == "cuda"
        if self._compiled:
            for layer in expert.expert.layers:
                layer.compile()
        self._rows: PrefixRows | None = None
        self._samplers: dict[tuple[int, int], ActionSampler] = {}

    @property
    def device(self) -> torch.device:
        """Device on which VLM and expert compute."""
        return self._expert.device

    def alongside(self, run: str | None, *, average: bool = False) -> "Driver":
        """A driver with another run's expert, or the base's for None, of the same observer, whose prompt and number of
        frames decide what both have seen.

        Raises what `load_driver` does.
        """
        path, trained = None, None
        _check_average(run, average=average)
        if run is not None:
            path, state = find_trained(run, self.checkpoint, **_vlm_of(self.checkpoint), average=average)
            trained = {"average": average, **state["files"]}
        expert = load_trained(self.checkpoint, path, self.device, average=average, dtype=self._expert.dtype)
        return Driver(self.observer, expert, capture=self._capture, compiled=self._compiled, trained=trained)

    def __call__(
        self,
        frames: NDArray[np.uint8],
        frame_times_us: ArrayLike,
        poses: ArrayLike,
        pose_times_us: ArrayLike,
        *,
        cameras: Sequence[str],
        t0_us: int | None = None,
        route: str | None = None,
        paths: int = 6,
        flow_steps: int = 10,
        seed: int = 0,
        noise: Tensor | ArrayLike | None = None,
        reasoning: bool = False,
        name: str = "drive",
    ) -> DrivenPaths:
        """Paths from one moment on.

        Args:
            frames: `[cameras, n, H, W, 3]` uint8 RGB at any rate, reaching from 0.1 s for each further frame that the
                model sees up to the moment.
            frame_times_us: `[cameras, n]`, or `[n]` for all cameras, whole microseconds.
            poses: `[m, 7]` x y z (m), qx qy qz qw, vehicle to world, at any rate, from 1.5 s before the moment on.
            pose_times_us: `[m]`, on the clock of the frames.
            cameras: their names, such as `front_wide`, in the order of `frames`.
            t0_us: the moment, whole microseconds; by default the time of the newest frame that every camera has.
            route: navigation text for the prompt, where the model has a place for it.
            paths: how many.
            flow_steps: Euler steps from noise to action.
            seed: of the noise, which depends on `name` and the moment too, as `eval`'s does on the sample's id.
            noise: `[paths, 64, 2]` to use instead, a tensor or an array.
            reasoning: let the VLM reason before each path. Much slower: it writes up to 256 tokens.
            name: of the recording, in errors and for the random numbers.

        Raises `UsageError` for arrays or names that do not fit, `BadClipError` for frames or poses that do not reach
        far enough or cannot be of a car, `NonFiniteError` for paths that are not finite.
        """
        track = track_of_poses(poses, pose_times_us, name=name)
        seen = self.observer.look(frames, frame_times_us, track, cameras=cameras, t0_us=t0_us, route=route, name=name)
        return self.paths(seen, paths=paths, flow_steps=flow_steps, seed=seed, noise=noise, reasoning=reasoning)

    def look(
        self,
        frames: NDArray[np.uint8],
        frame_times_us: ArrayLike,
        track: Track,
        *,
        cameras: Sequence[str],
        t0_us: int | None = None,
        route: str | None = None,
        name: str = "drive",
    ) -> SeenMoment:
        """Have the VLM see a moment; arguments and errors are those of a call."""
        return self.observer.look(frames, frame_times_us, track, cameras=cameras, t0_us=t0_us, route=route, name=name)

    @torch.inference_mode(False)  # what is kept for later calls must not be of the caller's inference mode
    @torch.no_grad()
    def paths(
        self,
        seen: SeenMoment,
        *,
        paths: int = 6,
        flow_steps: int = 10,
        seed: int = 0,
        noise: Tensor | ArrayLike | None = None,
        reasoning: bool = False,
    ) -> DrivenPaths:
        """Paths from a moment that was seen; arguments and errors are those of a call."""
        paths, flow_steps, seed = counts(paths, flow_steps, seed)
        sample_id = seen.sample.ref.sample_id
        if noise is None:
            draws = eval_noise(seed, [sample_id], paths)[0]
        else:
            draws = noise_draws(noise, (paths, self._expert.action_space.waypoints, 2))
        tails: list[Tail] = []
        if reasoning:
            tails = self.observer.reasoned(seen, paths)
            cached = CachedSample(
                sample_id=sample_id, prefix=as_stored(seen.prefix), stem_len=seen.inputs.stem_len, tails=tuple(tails)
            )
            actions = after_rollouts(self._expert, cached, draws, flow_steps=flow_steps)
        else:
            actions = self._sampled(seen.prefix, draws.cpu(), flow_steps)
        return self._driven(seen, actions, tuple(tail.text for tail in tails))

    @torch.inference_mode(False)
    @torch.no_grad()
    def paths_together(
        self, seen: Sequence[SeenMoment], *, paths: int = 6, flow_steps: int = 10, seed: int = 0
    ) -> list[DrivenPaths]:
        """`paths` of several moments at once; the same to rounding."""
        paths, flow_steps, seed = counts(paths, flow_steps, seed)
        noise = eval_noise(seed, [one.sample.ref.sample_id for one in seen], paths).to(self.device)
        actions = sampled(self._expert, [as_stored(one.prefix) for one in seen], noise, flow_steps)
        return [self._driven(one, own, ()) for one, own in zip(seen, actions, strict=True)]

    def _driven(self, seen: SeenMoment, actions: Tensor, texts: tuple[str, ...]) -> DrivenPaths:
        space, sample = self._expert.action_space, seen.sample
        history = torch.from_numpy(sample.history_xyz), torch.from_numpy(sample.history_rot)
        xyz, rot = to_paths(space, actions, *history)
        if not (np.isfinite(xyz).all() and np.isfinite(rot).all()):
            raise NonFiniteError(
                f"the model {self.checkpoint.model} predicts paths for {sample.ref.sample_id} that are not finite: its "
                "weights are broken. Take an earlier checkpoint."
            )
        position, rotation = pose_at(seen.track, sample.ref.t0_us)
        scale = torch.tensor([space.accel_std, space.curvature_std])
        return DrivenPaths(
            times_us=sample.ref.t0_us + STEP_US * np.arange(1, xyz.shape[1] + 1, dtype=np.int64),
            xyz=xyz,
            rot=rot,
            actions=actions.numpy(),
            controls=(actions * scale + torch.tensor([space.accel_mean, space.curvature_mean])).numpy(),
            position_m=position,
            rotation=rotation,
            texts=texts,
        )

    def _sampled(self, prefix: PrefixFeatures, noise: Tensor, flow_steps: int) -> Tensor:
        """Actions `[K, 64, 2]` on the CPU from noise `[K, 64, 2]`."""
        tokens = prefix.prefix_len
        rows = self._rows_for(prefix)
        layout = rows.layout
        kv = rows.data[0, : layout.size_bytes(tokens)].view(layout.dtype).view(layout.shape(tokens))
        attended = self._expert.prefix_layers
        pairs = [(kv, (prefix.keys, prefix.values))]
        if len(attended) < len(prefix.keys):
            pairs = [(kv[place], (prefix.keys[layer], prefix.values[layer])) for place, layer in enumerate(attended)]
        for target, (keys, values) in pairs:
            target.select(-4, 0).copy_(keys)
            target.select(-4, 1).copy_(values)
        kind = (len(noise), flow_steps)
        if kind not in self._samplers:
            while len(self._samplers) >= _KEPT_GRAPHS:
                del self._samplers[next(iter(self._samplers))]
            self._samplers[kind] = ActionSampler(
                self._expert, rows, paths=len(noise), flow_steps=(flow_steps,), capture=self._capture
            )
        batch = Batch(
            positions=(0,),
            sample_ids=("",),
            action=torch.zeros(1, self._expert.action_space.waypoints, 2),
            rows=(0,),
            lengths=(tokens,),
            stored=(tokens,),
            stems=(tokens,),
            starts=(prefix.start_position,),
            turns=("straight",),
            ready=None,
        )
        underway = self._samplers[kind].run(batch, noise[None])
        if underway.ended is not None:
            underway.ended.synchronize()
        return underway.action[0, 0].clone()

    def _rows_for(self, prefix: PrefixFeatures) -> PrefixRows:
        """Room for a prefix; a longer one than all before takes new room, and graphs are captured anew."""
        if self._rows is None or prefix.prefix_len > self._rows.longest:
            self._samplers.clear()
            self._rows = None
            _, kv_heads, _, head_dim = prefix.keys.shape
            layers = len(self._expert.prefix_layers)
            layout = PrefixLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=None)
            self._rows = PrefixRows(layout, prefix.prefix_len, batch_size=1, batches=1, device=self.device)
        return self._rows


def load_driver(
    model: str,
    run: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    average: bool = False,
    vlm: str | None = None,
    frames: int | None = None,
    blank: Sequence[str] | None = None,
    compiled: bool | None = None,
    capture: bool = True,
    memory_budget: int | None = None,
) -> Driver:
    """Load a driver: a base checkpoint or an export, and what a run has trained from it if one is given.

    Args:
        model: directory or hub id in the public layout.
        run: run directory (its best or else last checkpoint) or one of its checkpoints; adapters are merged.
        device: by default a GPU if there is one.
        dtype: of the VLM, bfloat16 by default, as `extract` runs it. The expert computes in bfloat16 on a GPU, in
            float32 on the CPU or with a VLM in float32, as `eval` does.
        average: take the run's average of the weights.
        vlm: directory or hub id whose VLM weights take the place of the model's own.
        frames: of each camera that the model sees; by default those of the run's stores, else 4.
        blank: cameras that black pictures stand in for; by default those of the run's stores.
        compiled: let torch.compile fuse small operations of VLM and expert; by default on a GPU that can.
        capture: on a GPU, replay all flow steps as one CUDA graph.
        memory_budget: most bytes of GPU memory. Where the VLM does not fit into it, its layers come for each look anew.

    Raises `UsageError` (`CheckpointError`) for a model or run that is not there or does not fit, `DataError` for a
    damaged run, `DeviceMemoryError`.
    """
    _check_average(run, average=average)
    if frames is not None:
        expected = f"1 to {MOST_FRAMES} for each camera"
        frames = whole(frames, "frames", expected=expected, least=1, most=MOST_FRAMES)
    if memory_budget is not None:
        memory_budget = whole(memory_budget, "memory_budget", expected="a whole number of bytes", least=1)
    black = None if blank is None else camera_names(blank, "blank")
    where = resolve_device(str(device) if device is not None else None)
    enter(where)
    checkpoint, path, seen, trained = Checkpoint(str(model), vlm=vlm), None, _Recorded(), None
    check_holds_vlm(checkpoint)
    if run is not None:
        path, state = find_trained(str(run), checkpoint, **_vlm_of(checkpoint), average=average)
        seen, trained = _recorded(state), {"average": average, **state["files"]}
    builder = InputBuilder(
        checkpoint, camera_names=seen.camera_names, frame_numbers=seen.frame_numbers, route_tokens=seen.route_tokens
    )
    dtype = dtype or torch.bfloat16
    compiled = has_kernels(where) if compiled is None else compiled
    if memory_budget is not None and where.type == "cuda":
        cap_memory(memory_budget, where)
    try:
        expert = load_trained(
            checkpoint, path, where, average=average, dtype=torch.float32 if dtype == torch.float32 else None
        )
        eyes = open_vlm(
            checkpoint,
            where,
            dtype=dtype,
            compiled=compiled,
            memory_budget=memory_budget,
            beside_bytes=sum(parameter.nbytes for parameter in expert.parameters()),
        )
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the weights of {model} do not fit on {where}: {error}\nEnd other programs on it, take one with more "
            "memory, or pass a memory budget below it: then the VLM's layers come one by one."
        ) from error
    observer = Observer(
        checkpoint,
        eyes,
        builder,
        frames=frames or seen.frames or FRAMES,
        blank=seen.blank if black is None else sort_cameras(black) if black else (),
    )
    return Driver(
        observer,
        expert,
        capture=capture,
        compiled=compiled,
        trained=trained,
        changes=seen.changes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """The prompt that the stores of a run have; None: as the model was trained."""

    camera_names: bool | None = None
    frame_numbers: bool | None = None
    route_tokens: bool | None = None
    frames: int | None = None
    blank: tuple[str, ...] = ()
    changes: tuple[str, ...] | None = None


def _recorded(state: Mapping[str, Any]) -> _Recorded:
    """Read what a run's state says of its stores. Runs of earlier versions may say less."""
    identity: Mapping[str, Any] = next(
        (store["identity"] for store in state["settings"]["stores"] if store["identity"]), {}
    )
    prompt = identity.get("prompt") or {}
    named, numbered = prompt_marks(identity)
    form = (prompt.get("route") or {}).get("form")
    return _Recorded(
        camera_names=named,
        frame_numbers=numbered,
        route_tokens=None if form is None else form == "(route)".join(ROUTE_TOKENS),
        frames=identity.get("frames"),
        blank=tuple(recorded_and_blank(identity)[1]),
        changes=tuple(changes_of(identity)) if identity else None,
    )


def _check_average(run: str | None, *, average: bool) -> None:
    if average and run is None:
        raise UsageError("average takes a run's average of the weights, and no run is named; name it, or leave it out.")


def _vlm_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of `find_trained` that name the VLM of a checkpoint."""
    home, _ = checkpoint.vlm_home
    other = {"id": home.model_id, "weights_sha256": checkpoint.vlm_fingerprint()}
    return {"vlm": None if home is checkpoint else other, "what": f"that of {home.model}"}
