"""What gold does while a proxy is optimized: by best-of-n, plain and with uncertainty counted against it, or by PPO.

Of a pool of N answers to each of P prompts every run of a proxy (a seed) says a mean score, and maybe its uncertainty.
What a method chooses with gold (k, and how far to go) it chooses on some prompts; all that is shown is of the others.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evaluation.best_of_n import best_of_n_kl, rank_weights
from rlhf_jax.objectives.adjustment import Moments, adjusted

Array = np.ndarray
Row = dict[str, Any]

ORACLE = "gold"  # the name of what ranks by gold itself
ROUNDING = 1e-9  # of gold; less is no difference
MAX_POINTS = 60  # of a policy's curve; longer ones are means over consecutive iterations

# --- best of n -------------------------------------------------------------------------------------------------------


def numbers_of(pool: int) -> list[int]:
    """1, 2, 4, ... and the pool itself."""
    return [1 << power for power in range((pool - 1).bit_length())] + [pool]


class Ranked:
    """Pools (P, N) of answers ordered by a score, answers of one score sharing what they are worth.

    Everything that is known of an answer goes through the one order, so that no column is left in another's.
    """

    def __init__(self, ranking: Array):
        """Raises ValueError where a score is not a number."""
        if np.isnan(ranking).any():
            raise ValueError("a score is not a number: answers without a score have no rank")
        self._order = np.argsort(ranking, axis=-1)
        ordered = np.take_along_axis(ranking, self._order, axis=-1)
        fresh = np.ones(ordered.shape, bool)  # where a group of equal scores begins
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        self._group: Array = np.cumsum(fresh).reshape(ordered.shape) - 1
        self._rows, self._below = np.nonzero(fresh)  # of each group: its pool, and how many answers score less
        self._sizes = np.bincount(self._group.reshape(-1))

    def best_of_n(self, values: Array, numbers: Sequence[int]) -> Array:
        """`best_of_n_estimate` of values (P, N) for every n at once, (P, len(numbers)) float64."""
        chosen = np.take_along_axis(values, self._order, axis=-1)
        shared = (np.bincount(self._group.reshape(-1), chosen.reshape(-1)) / self._sizes)[self._group]
        return shared @ np.stack([rank_weights(shared.shape[1], n) for n in numbers], -1)

    def kl(self, numbers: Sequence[int]) -> Array:
        """KL(best of n || pool) in nats, (P, len(numbers)): what choosing attains of `best_of_n_kl`.

        The pool is taken for the policy: n answers drawn from it with replacement, ties broken at random. Of answers
        that share a score the ratio to the pool is one, so that with F the pool's distribution of scores

            sum_g W_g log(W_g / P_g),  W_g = F(g)^n - F(below g)^n,  P_g = F(g) - F(below g)

        over the groups of equal scores. Without ties it lies below log n - (n - 1) / n by at most .04 nats, at n = N;
        with them it ends at -log of the pool's share of the best score.

        Reference: Beirami et al. (2024), arXiv 2401.01879.
        """
        count = self._group.shape[1]
        found = []
        for n in numbers:
            below_or_at = (np.arange(count + 1) / count) ** n
            weights = below_or_at[self._below + self._sizes] - below_or_at[self._below]
            ratio = np.divide(weights * count, self._sizes, out=np.ones_like(weights), where=weights > 0)
            found.append(np.bincount(self._rows, weights * np.log(ratio)))
        return np.stack(found, -1)


def same_scores(values: Array, answers: Array) -> Array:
    """Values (P, N) in which a repeated answer has what its first one has, whatever a batch's rounding made of it.

    Args:
      values: (P, N).
      answers: (P, N), a number for each answer, the same for the same tokens.
    """
    out = []
    for row, same in zip(values, answers, strict=True):
        _, first, place = np.unique(same, return_index=True, return_inverse=True)
        out.append(row[first[place]])
    return np.stack(out)


# --- intervals -------------------------------------------------------------------------------------------------------


def crossed_interval(name: str, values: Array, against: Array | None = None) -> dict[str, float]:
    """The mean over runs and prompts with its 95 % interval over both: other seeds and other prompts.

        var = s2_runs / R + s2_prompts / P - s2_rest / (R P), and at least either of the first two

    of the variances of the runs' means, of the prompts' means, and of what neither explains; Student's t with
    Satterthwaite's degrees of freedom. Of one run it is the interval over prompts.

    Args:
      name: the figure's name.
      values: (R, P).
      against: (R', P) subtracted: run by run where there are as many, prompt by prompt always.

    Returns:
      {name, name + "_low", name + "_high"}; one run of one prompt has no interval.

    Reference: Satterthwaite (1946), Biometrics Bulletin 2, 110-114; the variance is that of crossed random effects.
    """
    from scipy.stats import t  # slow to import

    if against is None:
        parts = [values]
    elif values.shape == against.shape:
        parts = [values - against]
    else:
        parts = [values, -against]
    prompts = sum(part.mean(0) for part in parts)
    mean, count = float(np.mean(prompts)), values.shape[1]
    terms = [(part.mean(1).var(ddof=1) / len(part), len(part) - 1) for part in parts if len(part) > 1]
    rest = 0.0
    if count > 1:
        terms.append((np.var(prompts, ddof=1) / count, count - 1))
        rest = sum(_rest(part) for part in parts if len(part) > 1)
    if not terms:
        return {name: mean}
    variance = max(sum(term for term, _ in terms) - rest, max(term for term, _ in terms))
    half = 0.0
    if variance > 0:
        degrees = variance**2 / sum(term**2 / degrees for term, degrees in terms)
        degrees = max(degrees, min(degrees for _, degrees in terms))
        half = float(t.ppf(0.975, degrees)) * math.sqrt(variance)
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def _rest(values: Array) -> float:
    """The variance of the mean that neither runs nor prompts explain, values (R, P)."""
    runs, count = values.shape
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return float((rest**2).sum() / ((runs - 1) * (count - 1)) / (runs * count))


# --- the laboratory --------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """One way to rank answers, of R runs: (R, P, len(numbers)) each."""

    gold: Array  # of the best of n
    proxy: Array  # what the proxy itself says of it, in standard deviations of its scores
    kl: Array

    def of(self, prompts: Array) -> "Method":
        return Method(*(values[:, prompts] for values in self))

    def farthest(self) -> int:
        """Where the mean gold is largest: the place of an n, the first of those that only rounding tells apart."""
        means = self.gold.mean((0, 1))
        return int(np.argmax(means >= means.max() - ROUNDING))


def standardized(values: Array) -> Array:
    """Values with mean 0 and standard deviation 1; where all are the same, 0."""
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


def method(runs: Sequence[Moments], gold: Array, kind: str, k: float, numbers: Sequence[int]) -> Method:
    """What best-of-n by the adjusted scores of a proxy's runs makes of gold (P, N)."""
    found: list[tuple[Array, Array, Array]] = []
    for run in runs:
        ranked = Ranked(np.asarray(adjusted(run, kind, k), np.float64))
        own = standardized(np.asarray(run.mean, np.float64))
        found.append((ranked.best_of_n(gold, numbers), ranked.best_of_n(own, numbers), ranked.kl(numbers)))
    return Method(*(np.stack(parts) for parts in zip(*found, strict=True)))


def tried(runs: Sequence[Moments], adjustments: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    """The (kind, k) that runs know enough for: "worst" needs members, "std" and "variance" a variance."""
    for kind, strengths in adjustments.items():
        needed = "lowest" if kind == "worst" else "variance"
        if all(getattr(run, needed) is not None for run in runs):
            yield from ((kind, float(k)) for k in strengths)


def laboratory(
    proxies: Mapping[str, Sequence[Moments]],
    gold: Array,
    adjustments: Mapping[str, Sequence[float]],
    selected: Array,
) -> dict[str, Any]:
    """Every proxy by best-of-n, plain and with each kind of adjustment at the k that gold prefers.

    Args:
      proxies: name -> its runs, each with moments (P, N); the first one's plain mean is what others are compared with.
      gold: (P, N) with mean 0 and standard deviation 1.
      adjustments: kind -> its k to try.
      selected: (P,) bool, the prompts that choose: of each kind its k, by gold at the largest n, and of every method
        its n. Every figure but `sweep`'s "selection" is of the other prompts.

    Returns:
      {conditions, curves, sweep, chosen}. A row of `conditions` is {proxy, adjustment, k, runs, peak_n, peak_kl, peak,
      end, drop, falls, runs_fall, proxy_end, kl_end} with intervals: `peak` is the gold at the n chosen, `end` at the
      largest, `drop` what is lost between, and gold `falls` where the interval of that leaves 0 out; `runs_fall` is how
      many runs fall so by themselves, each behind a peak of its own. `gain` and `peak_gain` are
      end and peak less the same proxy's plain ones, `first_gain` and `first_peak_gain` less the first proxy's. A row of
      `curves` is {proxy, adjustment, k, points of {n, kl_bound, kl, gold, proxy}, fit}; `chosen` is proxy -> kind -> k.
    """
    numbers = numbers_of(gold.shape[1])
    chosen: dict[str, dict[str, float]] = {}
    sweep: list[Row] = []
    shown: dict[tuple[str, str, float], Method] = {}
    for name, runs in proxies.items():
        shown[name, "none", 0.0] = method(runs, gold, "none", 0.0, numbers)
        best: dict[str, tuple[float, float]] = {}
        for kind, k in tried(runs, adjustments):
            found = method(runs, gold, kind, k, numbers)
            scored = float(found.of(selected).gold[..., -1].mean())
            ends = crossed_interval("end", found.of(~selected).gold[..., -1])
            sweep.append({"proxy": name, "adjustment": kind, "k": k, "selection": scored, **ends})
            if kind not in best or scored > best[kind][0]:
                best[kind] = scored, k
                shown[name, kind, 0.0] = found
        for kind, (_, k) in best.items():
            shown[name, kind, k] = shown.pop((name, kind, 0.0))
        chosen[name] = {kind: k for kind, (_, k) in best.items()}
    oracle: Any = gold
    shown[ORACLE, "oracle", 0.0] = method([Moments(oracle)], gold, "none", 0.0, numbers)
    conditions, curves = [], []
    first = shown[next(iter(proxies)), "none", 0.0]
    for (name, kind, k), found in shown.items():
        label = {"proxy": name, "adjustment": kind, "k": k if kind in ("std", "variance") else None}
        plain = shown.get((name, "none", 0.0), first)
        conditions.append(label | _condition(found, plain, first, selected, numbers))
        curves.append(label | _curve(found.of(~selected), numbers))
    return {"conditions": conditions, "curves": curves, "sweep": sweep, "chosen": chosen}


def _condition(found: Method, plain: Method, first: Method, selected: Array, numbers: Sequence[int]) -> Row:
    """A row of `conditions`, without what names it."""

    def held(one: Method) -> tuple[Array, Array]:
        """(R, P) gold at the method's own n, and at the largest."""
        values = one.of(~selected).gold
        return values[..., one.of(selected).farthest()], values[..., -1]

    def falls(one: Method) -> bool:
        return crossed_interval("drop", *held(one)).get("drop_low", 0.0) > ROUNDING

    place, other = found.of(selected).farthest(), found.of(~selected)
    peak, end = held(found)
    row = {
        "runs": len(peak),
        "peak_n": numbers[place],
        "peak_kl": float(other.kl[..., place].mean()),
        **crossed_interval("peak", peak),
        **crossed_interval("end", end),
        **crossed_interval("drop", peak, end),
        "proxy_end": float(other.proxy[..., -1].mean()),
        "kl_end": float(other.kl[..., -1].mean()),
    }
    row["falls"] = falls(found)
    row["runs_fall"] = sum(falls(Method(*(values[[run]] for values in found))) for run in range(len(peak)))
    for prefix, baseline in (("", plain), ("first_", first)):
        if found is not baseline and (prefix == "" or plain is not first):
            before = held(baseline)
            row |= crossed_interval(f"{prefix}gain", end, before[1])
            row |= crossed_interval(f"{prefix}peak_gain", peak, before[0])
    return row


def _curve(found: Method, numbers: Sequence[int]) -> Row:
    points = []
    for place, n in enumerate(numbers):
        point = {"n": n, "kl_bound": float(best_of_n_kl(n)), "kl": float(found.kl[..., place].mean())}
        point |= crossed_interval("gold", found.gold[..., place]) | {"proxy": float(found.proxy[..., place].mean())}
        points.append(point)
    return {"points": points, "fit": gao_fit([x["kl"] for x in points], [x["gold"] for x in points], "best_of_n")}


# --- fits, and policies ----------------------------------------------------------------------------------------------


def gao_fit(kl: Sequence[float], gold: Sequence[float], form: str) -> dict[str, float | None]:
    """Least squares of gold over d = sqrt(KL), of the form "best_of_n" or "rl":

        R(d) = d (alpha - beta d)    or    R(d) = d (alpha - beta log d)

    Points without a finite value, and those at a KL of 0 or below, which every curve passes through, are left out.

    Returns:
      {alpha, beta, peak_kl, r2}, None where there are fewer than three points. `peak_kl` is where the fitted curve is
      highest, (alpha / 2 beta)^2 or exp(2 alpha / beta - 2), None where it only rises; `r2` the share of the variance.

    Reference: Gao et al., arXiv 2210.10760, section 3.1.
    """
    x, y = np.asarray(kl, np.float64), np.asarray(gold, np.float64)
    kept = np.isfinite(x) & np.isfinite(y) & (x > 0)
    d, y = np.sqrt(x[kept]), y[kept]
    if len(np.unique(d)) < 3:
        return dict.fromkeys(("alpha", "beta", "peak_kl", "r2"))
    bent = d * d if form == "best_of_n" else d * np.log(d)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -bent], -1), y, rcond=None)
    total = float(((y - y.mean()) ** 2).sum())
    error = float(((y - d * alpha + bent * beta) ** 2).sum())
    peak = None
    if beta > 0 and (alpha > 0 or form == "rl"):
        with np.errstate(over="ignore"):
            peak = float((alpha / (2 * beta)) ** 2 if form == "best_of_n" else np.exp(2 * alpha / beta - 2))
    peak = peak if peak is not None and math.isfinite(peak) else None
    return {"alpha": float(alpha), "beta": float(beta), "peak_kl": peak, "r2": 1 - error / total if total > 0 else None}


def policy_curve(runs: Sequence[tuple[Array, Array]]) -> Row:
    """Gold over KL of a policy that is trained, the mean of R runs at the same iteration.

    Args:
      runs: (KL in nats a sequence, gold) (T,) of each run's iterations; the shortest run ends the curve.

    Returns:
      {runs, points of {kl, root_kl, gold}, peak_kl, peak, end, fit}, and of several runs Student's intervals over them
      and `drop`: from the peak to the last point, each run's peak found by the other runs, so that none finds its own.
    """
    length = min(len(kl) for kl, _ in runs)
    size = math.ceil(length / MAX_POINTS)
    starts = np.arange(0, length, size)
    counts = np.diff(np.append(starts, length))

    def binned(x: Array) -> Array:
        return np.add.reduceat(np.asarray(x[:length], np.float64), starts) / counts

    kl = np.stack([binned(np.maximum(kl, 0)) for kl, _ in runs])
    gold = np.stack([binned(gold) for _, gold in runs])
    roots = np.sqrt(kl).mean(0)
    points = []
    for place, root in enumerate(roots):
        point = {"kl": float(root**2), "root_kl": float(root)}
        points.append(point | crossed_interval("gold", gold[:, place : place + 1]))
    place = int(np.argmax(gold.mean(0)))
    row: Row = {"runs": len(runs), "points": points, "peak_kl": points[place]["kl"], "peak": points[place]["gold"]}
    row |= {name.replace("gold", "end"): value for name, value in points[-1].items() if name.startswith("gold")}
    if len(runs) > 1:
        others = (gold.sum(0) - gold) / (len(runs) - 1)
        peaks = gold[np.arange(len(runs)), np.argmax(others, axis=-1)]
        row |= crossed_interval("drop", (peaks - gold[:, -1])[:, None])
        row["falls"] = row["drop_low"] > 0
    return row | {"fit": gao_fit([x["kl"] for x in points], [x["gold"] for x in points], "rl")}
