"""A drive through a town, as an inertial navigation system records it, and pictures that turn as it does."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track, frame_indices, history_and_future
from alpacache.sources.recording import sample_of, wanted_frame_times_us

TURNS = ((8, 1.4), (19, -1.5), (30, 0.6), (38, 1.5), (47, -0.5), (54, -1.2))
"""Middle (s) and angle (rad, left positive) of each turn."""


def drive_through_town(*, seconds=60, hz=10, begin_us=1_700_000_000_000_000, lever_m=0.0):
    """Poses of a car that turns six times at 4 to 13 m/s and stops once; `lever_m` in front of its rear axle."""
    fine = np.arange(0, seconds, 0.01)
    speed, rate = np.full(len(fine), 9.5) + 2.0 * np.sin(0.21 * fine), np.zeros(len(fine))
    for middle, angle in TURNS:
        bump = np.exp(-(((fine - middle) / 1.3) ** 2))
        rate += angle * bump / (1.3 * np.sqrt(np.pi))
        speed -= abs(angle) * 2.9 * np.exp(-(((fine - middle) / 3.0) ** 2))
    speed *= 1 - np.exp(-(((fine - 25) / 2.0) ** 4))  # a red light
    yaw = 0.4 + np.cumsum(rate) * 0.01
    xy = np.cumsum(np.stack([speed * np.cos(yaw), speed * np.sin(yaw)], axis=1), axis=0) * 0.01
    xy += lever_m * np.stack([np.cos(yaw), np.sin(yaw)], axis=1)
    chosen = slice(None, None, round(100 / hz))
    yaw, xyz = yaw[chosen], np.pad(xy[chosen], ((0, 0), (0, 1)))
    times = begin_us + np.round(fine[chosen] * 1e6).astype(np.int64)
    return Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=Rotation.from_euler("z", yaw[:, None]).as_quat())


class Panorama:
    """A recorded source whose camera stands 1.5 m above a road, in the middle of a painted cylinder: what is above the
    road moves as the vehicle turns, the road as it drives. `drift` is that of the pictures' clock."""

    def __init__(self, tracks, *, late_s=0.0, mirrored=False, drift=0.0):
        self.name, self.clip_ids, self._tracks = "panorama", list(tracks), tracks
        self._late_us, self._mirrored, self._drift = round(late_s * 1e6), mirrored, drift
        rng, width = np.random.default_rng(0), 512
        waves = rng.normal(size=(64, width // 2 + 1)) + 1j * rng.normal(size=(64, width // 2 + 1))
        waves[:, 30:] = 0
        self._cylinder = np.fft.irfft(waves, width)
        self._cylinder = 128 + 40 * self._cylinder / self._cylinder.std()
        self._asphalt = rng.uniform(80, 180, size=(128, 128))  # a patch each two metres
        below = np.arange(8, 32)[:, None] + 0.5  # rows of the road, under a horizon in the middle of the picture
        self._ahead = 1.5 * width / (2 * np.pi) / below + 0 * np.arange(128)
        self._aside = 1.5 * (np.arange(128) - 63.5) / below

    def track(self, clip_id):
        return self._tracks[clip_id]

    def frame_times_us(self, clip_id, camera):
        return self.track(clip_id).timestamps_us

    def times_us(self, clip_id):
        times = self.track(clip_id).timestamps_us
        return int(times[0]), int(times[-1])

    def film(self, clip_id, camera, times_us):
        track = self._tracks[clip_id]
        yaw = np.unwrap(Rotation.from_quat(track.quaternion_xyzw).as_euler("ZYX")[:, 0])
        way = np.pad(np.cumsum(np.linalg.norm(np.diff(track.xyz, axis=0), axis=1)), (1, 0))
        begin_us = track.timestamps_us[0]
        pictures = []
        for time_us in begin_us + (times_us - begin_us) * (1 - self._drift) - self._late_us:
            angle, driven = (np.interp(time_us, track.timestamps_us, values) for values in (yaw, way))
            picture = self._cylinder[:, (np.arange(128) - round(angle / (2 * np.pi) * 512)) % 512].copy()
            place = [(self._ahead + driven) / 2, self._aside / 2 + 64]
            picture[40:] = map_coordinates(self._asphalt, place, order=1, mode="grid-wrap")
            picture = np.clip(picture[:, :: -1 if self._mirrored else 1], 0, 255).astype(np.uint8)
            pictures.append(np.repeat(picture[None], 3, axis=0))
        return np.stack(pictures)

    def load(self, ref, *, cameras, frames):
        times = wanted_frame_times_us(ref.t0_us, frames)
        track = self.track(ref.clip_id)
        times = track.timestamps_us[frame_indices(track.timestamps_us, times)]
        shots = {camera: (self.film(ref.clip_id, camera, times), times) for camera in cameras}
        return sample_of(ref, history_and_future(track, ref.t0_us), shots, None)


@pytest.fixture
def drive():
    return drive_through_town


@pytest.fixture
def panorama():
    return Panorama


@pytest.fixture
def camera():
    return FRONT_CAMERA
