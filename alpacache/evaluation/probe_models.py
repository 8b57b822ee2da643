"""Probes: how well a ridge regression, and a small MLP on top, predict targets from vectors, on clips never seen.

Vectors have thousands of numbers and samples are hundreds, so both work on the matrix of dot products between samples.
Everything that is fitted (means, scales, penalty, mixture, when to stop) is fitted within the training folds. All
samples of a clip lie in one fold, so a probe that recognises the clip gains nothing.
Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, sections 3.4.1, 7.10 and 18.3.5.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from alpacache import randomness
from alpacache.driving.sample import Floats

Rows: TypeAlias = NDArray[np.intp]
Probe: TypeAlias = Literal["ridge", "mlp", "products", "token", "attention"]
PROBES: tuple[Probe, ...] = ("ridge", "mlp")
"""Those of pooled vectors as they are; `products` reads products of two of their components. Of single tokens `token`
reads those in the places that tell most, and `attention` what queries find wherever it stands."""
FOLDS, INNER_FOLDS = 5, 4
PENALTIES = np.logspace(-4, 4, 13)
"""Penalties that the ridge chooses from, as multiples of the mean eigenvalue."""
SHARES = (0.0, 0.1, 0.3, 0.7, 1.0)
"""Shares of the features in the mixture with history; 0 is history alone, so useless features can be left out."""
COMPONENTS = 48
"""Principal components that the MLP sees."""
HIDDEN_UNITS = 64
BUMPS, BUMP_WIDTH = 12, 0.45
"""Gaussian bumps over one column of the history, from -2.5 to 2.5 standard deviations: what bends may be made of."""
BENT_COLUMNS, BEST_TOKENS = 4, 2
"""Columns of the history whose bends a probe takes, and places whose tokens it reads, for each target."""
QUERIES = 128
"""Tokens that `attention` compares all tokens with."""
PAIRED, TELLING_PAIRS = 24, 1
"""Strongest components of the pooled vectors whose products are read, and, for each target, products of two columns of
the history that a probe takes."""
BEND_SHARE = 0.1
"""Weight of the bends, and of the products, beside the history's own columns."""
_CHUNK = 128
"""Positions that are looked at together."""
LR, WEIGHT_DECAY, BATCH = 3e-3, 1e-2, 64
EPOCHS, PATIENCE = 80, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Predictions `[N, targets]` for each sample by a probe fitted without its fold."""

    mean: Floats
    """Mean of the training folds: what R^2 is measured against."""
    features: Floats
    history: Floats | None = None
    both: Floats | None = None


def group_folds(clips: Sequence[str], count: int, *, seed: int) -> list[Rows]:
    """Deal clips to folds by seed, the next always to the smallest, and return the rows of each fold.

    Raises `ValueError` for fewer clips than folds.
    """
    names, clip_of_row, clip_sizes = np.unique(
        np.asarray(clips, dtype=np.str_), return_inverse=True, return_counts=True
    )
    if len(names) < count:
        raise ValueError(f"{len(names)} clips cannot fill {count} folds.")
    fold_sizes, fold_of_clip = np.zeros(count, np.int64), np.empty(len(names), np.int64)
    for clip in np.random.default_rng(seed).permutation(len(names)):
        fold_of_clip[clip] = fold_sizes.argmin()
        fold_sizes[fold_of_clip[clip]] += clip_sizes[clip]
    return [np.flatnonzero(fold_of_clip[clip_of_row] == fold) for fold in range(count)]


def shuffled_within(folds: Sequence[Rows], *, seed: int) -> Rows:
    """Permute rows within their folds, for a control whose features belong to other samples."""
    order = np.empty(sum(map(len, folds)), np.intp)
    rng = np.random.default_rng(seed)
    for rows in folds:
        order[rows] = rng.permutation(rows)
    return order


def cross_validate(
    probes: Sequence[Probe],
    features: NDArray[np.float32],
    history: Floats | None,
    targets: Floats,
    clips: Sequence[str],
    folds: Sequence[Rows],
    *,
    tokens: Mapping[Probe, NDArray[np.float32]] = MappingProxyType({}),
    seed: int = 0,
) -> Iterator[dict[Probe, Predictions]]:
    """Fit and predict fold by fold; yields the same predictions after each, complete after the last.

    Args:
        probes: `ridge`, or `ridge` and `mlp`.
        features: `[N, D]` vectors.
        history: `[N, H]` the ego history; without it only `features` are read.
        targets: `[N, targets]`.
        clips: N clip ids.
        folds: rows of each outer fold.
        tokens: for each probe of chosen vectors that is fitted too, what it chooses from: `[N, choices, K]`.
        seed: seed of the inner folds and of the MLP's start.
    """
    names = ("mean", "features") if history is None else ("mean", "features", "history", "both")
    single = {} if history is None else tokens
    kinds = [*probes, *single]
    result = {probe: Predictions(**{name: np.full(targets.shape, np.nan) for name in names}) for probe in kinds}
    bumps = None if history is None else _bumps(history)
    pairs = None if history is None else products(history)[:, 0, :, None]
    for number, test in enumerate(folds):
        train = np.setdiff1d(np.arange(len(targets)), test)
        centre, scale = _moments(targets[train])
        y = (targets[train] - centre) / scale
        fold_seed = 1000 * seed + number
        inner = group_folds([clips[row] for row in train], INNER_FOLDS, seed=fold_seed)
        past: list[NDArray[np.floating]] = []
        if history is not None and bumps is not None and pairs is not None:
            past = [
                history,
                *(_telling(bumps, y, train, count=BENT_COLUMNS), _telling(pairs, y, train, count=TELLING_PAIRS)),
            ]
        fits = _ridge(features, past, y, train, test, inner)
        predicted: dict[Probe, list[Floats]] = {"ridge": [new for new, _ in fits]}
        if "mlp" in probes:
            inputs = [_components(_gram(x, train, test)) for x in (features, history) if x is not None]
            inputs += [np.concatenate(inputs, axis=1)] if len(inputs) > 1 else []
            predicted["mlp"] = [_mlp(fit, x, y, inner, seed=fold_seed) for fit, x in zip(fits, inputs, strict=True)]
        for probe, choices in single.items():
            best = _telling(choices, y - fits[1][1], train, count=BEST_TOKENS)
            predicted[probe] = [new for new, _ in _ridge(best, past, y, train, test, inner)]
        for probe, into in result.items():
            into.mean[test] = centre
            for name, values in zip(names[1:], predicted[probe], strict=True):
                getattr(into, name)[test] = centre + scale * values
        yield result


def products(columns: NDArray[np.floating]) -> NDArray[np.float32]:
    """Squares of columns `[N, C]` and products of two, of standardised columns: `[N, 1, C * (C + 1) / 2]`.

    What two things tell together, and neither alone, no line through either finds.
    """
    centre, scale = _moments(columns)
    z = ((columns - centre) / scale).astype(np.float32)
    first, second = np.triu_indices(z.shape[1])
    paired: NDArray[np.float32] = (z[:, first] * z[:, second])[:, None]
    return paired


def strongest(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The strongest principal components of vectors `[N, D]`, `[N, PAIRED]` or fewer; no target is looked at."""
    every = np.arange(len(vectors))
    values, axes = np.linalg.eigh(_gram(vectors, every, every[:0]))
    strong = [place for place in range(len(values) - 1, -1, -1) if values[place] > 1e-6 * values[-1]][:PAIRED]
    components: NDArray[np.float32] = (axes[:, strong] * values[strong] ** 0.5).astype(np.float32)
    return components


def attended(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """What queries find in each sample, wherever it stands: `[N, 1, 2 * QUERIES]`.

    Of each query the largest and the smallest dot product with the sample's tokens: attention that puts all weight on
    one token. A token is taken by how it departs from what usually stands in its place, whitened, as otherwise the
    loudest of the prefix would win in every sample. The queries are the most outlying tokens of some samples: a token
    that knows what the others do not differs from them. No target is looked at.

    Args:
        tokens: `[N, positions, K]`.
    """
    centre = tokens.mean(axis=0)
    spread = np.sqrt(sum((sample - centre) ** 2 for sample in tokens) / len(tokens))
    scale = np.where(spread > 1e-6 * (1e-6 + np.abs(centre)), spread, 1)
    products = sum(each.T @ each for each in ((sample - centre) / scale for sample in tokens))
    values, vectors = np.linalg.eigh(products / (len(tokens) * len(centre)))
    whitening = (vectors / np.sqrt(np.maximum(values, 1e-6 * max(values[-1], 1e-6)))).astype(np.float32)
    outlying = np.stack([white[(white**2).sum(axis=1).argmax()] for white in _white(tokens, centre, scale, whitening)])
    queries = outlying[np.random.default_rng(0).permutation(len(tokens))[:QUERIES]].T
    alike = (white @ queries for white in _white(tokens, centre, scale, whitening))
    return np.stack([[np.concatenate([each.max(axis=0), each.min(axis=0)])] for each in alike])


def _white(tokens: NDArray[np.float32], *standard: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Sample by sample, as all at once would take several times the memory of the tokens."""
    centre, scale, whitening = standard
    return (((sample - centre) / scale) @ whitening for sample in tokens)


_Fit: TypeAlias = tuple[Floats, Floats]
"""A ridge's standardised predictions: for the test rows `[test, targets]`, and, by ridges of the other inner folds, for
the training rows `[train, targets]`."""


def _ridge(
    features: NDArray[np.floating],
    past: Sequence[NDArray[np.floating]],
    y: Floats,
    train: Rows,
    test: Rows,
    inner: Sequence[Rows],
) -> list[_Fit]:
    """Fit features alone, or with a past also that and both; penalty and share are the best on the inner folds.

    They are chosen for each target. y `[train, targets]` is standardised; `inner` holds positions in `train`.
    """
    held = np.empty((len(SHARES) if past else 1, len(PENALTIES), *y.shape))
    for rows in inner:
        fitted = np.delete(np.arange(len(train)), rows)
        held[:, :, rows] = _ridge_paths(features, past, y[fitted], train[fitted], train[rows])
    new = _ridge_paths(features, past, y, train, test)
    errors = ((held - y) ** 2).sum(2)
    fits = []
    for allowed in [slice(-1, None), slice(0, 1), slice(None)] if past else [slice(-1, None)]:
        best = errors[allowed].reshape(-1, y.shape[1]).argmin(0)
        new_best, held_best = (
            np.stack([path[allowed].reshape(-1, *path.shape[2:])[place, :, k] for k, place in enumerate(best)], axis=-1)
            for path in (new, held)
        )
        fits.append((new_best, held_best))
    return fits


def _ridge_paths(
    features: NDArray[np.floating], past: Sequence[NDArray[np.floating]], y: Floats, train: Rows, test: Rows
) -> Floats:
    """Predictions `[shares, penalties, test, targets]` of ridges on the training rows, y `[train, targets]`.

    The past is the history, its bends and its products, or the history alone.
    """
    seen = _gram(features, train, test)
    if not past:
        return _ridge_path(seen, y)[None]
    weights = (1 - BEND_SHARE * (len(past) - 1), *[BEND_SHARE] * (len(past) - 1))
    before = sum(weight * _gram(part, train, test) for weight, part in zip(weights, past, strict=True))
    return np.stack([_ridge_path((1 - share) * before + share * seen, y) for share in SHARES])


def _bumps(history: Floats) -> Floats:
    """Gaussian bumps `[N, columns, BUMPS]` of each column of the history `[N, columns]`."""
    centre, scale = _moments(history)
    places = np.linspace(-2.5, 2.5, BUMPS)
    bumps: Floats = np.exp(-((((history - centre) / scale)[:, :, None] - places) ** 2) / (2 * BUMP_WIDTH**2))
    return bumps


def _telling(groups: NDArray[np.floating], y: Floats, train: Rows, *, count: int) -> NDArray[np.floating]:
    """The groups of columns that explain most of y on the training rows, side by side: `[N, chosen * K]`.

    Args:
        groups: `[N, G, K]`: a position's token, or a column's bumps.
        y: `[train, targets]`; for each target `count` groups are chosen, a few times fewer where targets agree.
    """
    explained = []
    for start in range(0, groups.shape[1], _CHUNK):
        x = groups[train, start : start + _CHUNK].astype(np.float64)
        centre, scale = _moments(x)
        x = ((x - centre) / scale).transpose(1, 2, 0)
        inner = x @ x.transpose(0, 2, 1) + 0.1 * len(train) * np.eye(x.shape[1])
        outer = x @ y
        explained.append((outer * np.linalg.solve(inner, outer)).sum(1))
    best = np.argsort(-np.concatenate(explained), axis=0)[:count]
    return groups[:, np.unique(best)].reshape(len(groups), -1)


def _ridge_path(gram: Floats, y: Floats) -> Floats:
    """Predictions `[penalties, rows - n, targets]` of rows n onwards of `gram` `[rows, n]`, fitted to those before."""
    n = gram.shape[1]
    values, vectors = np.linalg.eigh(gram[:n])
    middle = y.mean(0)
    seen = vectors.T @ (y - middle)
    weights = seen / (np.maximum(values, 0)[:, None] + PENALTIES[:, None, None])
    predicted: Floats = middle + (gram[n:] @ vectors) @ weights
    return predicted


def _gram(x: NDArray[np.floating], train: Rows, test: Rows) -> Floats:
    """Dot products `[train + test, train]` of vectors standardised by the training rows; the mean eigenvalue is 1."""
    centre, scale = _moments(x[train])
    z = np.concatenate([x[train], x[test]])
    z -= centre
    z /= scale
    gram: Floats = (z @ z[: len(train)].T).astype(np.float64)
    gram /= max(np.trace(gram) / len(train), np.finfo(np.float32).tiny)
    return gram


def _moments(x: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Mean and standard deviation of columns, 1 where a column does not vary."""
    centre, scale = x.mean(0), x.std(0)
    return centre, np.where(scale > 1e-6 * (1e-6 + np.abs(centre)), scale, 1)


def _mlp(fit: _Fit, x: Floats, y: Floats, inner: Sequence[Rows], *, seed: int) -> Floats:
    """Predictions `[test, targets]`: the ridge's plus MLPs on x `[train + test, k]` fitted to its residual.

    The mean of as many MLPs as there are inner folds, each stopped early by one of them.
    """
    new, held = fit
    residual = y - held
    members = [_train_mlp(x, residual, rows, seed=f"{seed}|{number}") for number, rows in enumerate(inner)]
    predicted: Floats = new + np.mean(members, axis=0)
    return predicted


def _components(gram: Floats) -> Floats:
    """Principal components `[rows, k]` of `gram` `[rows, n]`, of unit variance on average over the training rows.

    Scaled halfway to whitening: unscaled, the first drown the others; whitened, the last are loud noise.
    """
    n = gram.shape[1]
    values, vectors = np.linalg.eigh(gram[:n])
    strong = [place for place in range(n - 1, -1, -1) if values[place] > 1e-6 * values[-1]][:COMPONENTS]
    loud = values[strong] ** 0.5
    scores: Floats = gram @ (vectors[:, strong] / values[strong]) * np.sqrt(n) * loud / np.sqrt((loud**2).mean())
    return scores


def _train_mlp(x: Floats, y: Floats, held: Rows, *, seed: str) -> Floats:
    """Predictions for the rows of x beyond y's, for each target by the epoch that does best on the held rows.

    The start predicts 0 and counts as an epoch, so an MLP that learns nothing changes nothing.
    """
    generator = randomness.generator("probe", seed)
    inputs, truth = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    fitted = torch.from_numpy(np.delete(np.arange(len(y)), held))
    weights = [
        torch.randn(x.shape[1], HIDDEN_UNITS, generator=generator) * x.shape[1] ** -0.5,
        torch.zeros(HIDDEN_UNITS),
        torch.zeros(HIDDEN_UNITS, y.shape[1]),
        torch.zeros(y.shape[1]),
    ]
    for tensor in weights:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY)
    checked, new = torch.from_numpy(held), slice(len(y), None)
    best, last_better = (truth[checked] ** 2).mean(0), 0
    predicted = torch.zeros(len(x) - len(y), y.shape[1])
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.split(fitted[torch.randperm(len(fitted), generator=generator)], BATCH):
            loss = F.mse_loss(_forward(weights, inputs[rows]), truth[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            error = ((_forward(weights, inputs[checked]) - truth[checked]) ** 2).mean(0)
            better = error < best
            if better.any():
                predicted[:, better] = _forward(weights, inputs[new])[:, better]
                best, last_better = torch.minimum(best, error), epoch
        if epoch - last_better >= PATIENCE:
            break
    return predicted.double().numpy()


def _forward(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    return F.gelu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
