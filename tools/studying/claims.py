"""What the papers claim, which rows test it, and what the figures say of it.

A comparison is the difference of two means over seeds, with a 95 % interval of Student's t: its
spread is that between seeds of both rows together, or, where a row has one seed, that of all rows
of the main table with several, on the same data, or of the other row, whichever is larger (of
costs: of the row with several). It knows seeds only: both rows are of the same test list, and of
one world.

    did not hold        the whole interval is below what would be a difference worth a name (for
                        `keeps`: below the loss that is allowed)
    held                otherwise, the whole interval is above 0 (for `keeps`: above that loss)
    too noisy to say    neither, or nothing is known of the spread

A claim of several comparisons held if all did, and did not if one did not.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from scipy import stats

from tools.studying.results import Cells
from tools.studying.rows import ROWS, fusion_name

HELD, NOT_HELD, NOISY, MISSING = 'held', 'did not hold', 'too noisy to say', 'not run'
CONFIDENCE = 0.95
WORTH = 0.01  # a difference of shares below this is none
KEPT = 0.02  # what may be lost where a claim says that little is
COSTS_KEPT = 0.1  # what costs may be more where it says that they are the same
# Of these less is better, and differences are relative; of other figures, shares of 1, more is.
COSTS = ('memory', 'compute_seconds', 'trainable_parameters')
EXACT = ('memory', 'trainable_parameters')  # the same for all seeds
MAIN = tuple(row.name for row in ROWS if row.group == 'main')
FIXED = frozenset(row.name for row in ROWS if row.fixed)

MORE, KEEPS = 'more', 'keeps'


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row against another.

    Attributes:
      first, second: cells, 'dist/motion', or names of tests.
      figure: of the test list, or one of COSTS.
      wants: MORE, the first is better; KEEPS, it loses at most KEPT, or costs COSTS_KEPT more.
    """

    first: str
    second: str
    figure: str = 'top1'
    wants: str = MORE


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a paper.

    Attributes:
      name: unique.
      source: whose it is.
      text: the sentence, in our words.
      comparisons: that test it.
    """

    name: str
    source: str
    text: str
    comparisons: tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a comparison.

    Attributes:
      verdict: HELD, NOT_HELD, NOISY or MISSING.
      first, second: means.
      difference: of them, above 0 where the first is better; of costs as a share of the second.
      margin: half of the interval; None where nothing is known of the spread.
      pooled: one has a single seed, and the spread is not its own.
    """

    verdict: str
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    margin: float | None = None
    pooled: bool = False


@dataclasses.dataclass(frozen=True, order=True)
class Spread:
    """A standard deviation between seeds, and on how many it rests (degrees of freedom)."""

    deviation: float
    freedom: int


DIST, EVL = 'Qing et al., DiST', 'Lin et al., EVL'
SIDE4VIDEO, STS = 'Yao et al., Side4Video', 'Li et al., STS'


def _over(first: str, *others: str, figure: str = 'top1') -> tuple[Comparison, ...]:
    return tuple(Comparison(first, other, figure) for other in others)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        'frozen_motion',
        'all of DiST, EVL, Side4Video',
        'A light network beside a frozen image model learns motion that the mean of its frames '
        'does not show.',
        tuple(
            Comparison(f'{name}/motion', 'frame_mean/motion')
            for name in ('dist', 'evl', 'side4video')
        ),
    ),
    Claim(
        'frozen_memory',
        'all of DiST, EVL, Side4Video',
        'Without a backward pass through the image model a training step takes less memory than '
        'with one, as in full fine-tuning.',
        tuple(
            Comparison(f'{name}/motion', 'fine_tune/motion', 'memory')
            for name in ('dist', 'evl', 'side4video')
        ),
    ),
    Claim(
        'frozen_accuracy',
        'all of DiST, EVL, Side4Video',
        'The image model may stay frozen: little accuracy is lost against full fine-tuning (here '
        'of frames, so what is compared is looks).',
        tuple(
            Comparison(f'{name}/looks', 'fine_tune/looks', wants=KEEPS)
            for name in ('dist', 'evl', 'side4video')
        ),
    ),
    Claim(
        'dist_branches',
        DIST,
        'Each of the three branches, spatial, temporal and integration, adds to the accuracy.',
        _over(
            'dist/motion',
            'dist_no_spatial/motion',
            'dist_no_temporal/motion',
            'dist_no_integration/motion',
        ),
    ),
    Claim(
        'dist_alpha',
        DIST,
        'The image model may see every second frame only: little accuracy is lost, and time won.',
        (
            Comparison('dist/motion', 'dist_alpha_1/motion', wants=KEEPS),
            Comparison('dist/motion', 'dist_alpha_1/motion', 'compute_seconds'),
        ),
    ),
    Claim(
        'dist_frames',
        DIST,
        'More frames help: eight, here, over four.',
        _over('dist/motion', 'dist_4_frames/motion'),
    ),
    Claim(
        'dist_zero_shot',
        DIST,
        'With a text head, averaged with the frozen CLIP, classes that nobody was trained on are '
        'told better than by either alone (looks: the small CLIP never learned words of motion).',
        tuple(
            Comparison(fusion_name('looks_new', 0.5), fusion_name('looks_new', weight))
            for weight in (0.0, 1.0)
        ),
    ),
    Claim(
        'evl_parts',
        EVL,
        'Each of the three temporal parts of the decoder, convolution, positions and cross '
        'attention, adds to the accuracy.',
        _over('evl/motion', 'evl_no_conv/motion', 'evl_no_positions/motion', 'evl_no_cross/motion'),
    ),
    Claim(
        'evl_layers',
        EVL,
        'Decoder layers that read several blocks of the image model are better than one.',
        _over('evl/motion', 'evl_1_layer/motion'),
    ),
    Claim(
        'side4video_parts',
        SIDE4VIDEO,
        'The shift of class tokens and the convolution over time each add to the accuracy.',
        _over('side4video/motion', 'side4video_no_shift/motion', 'side4video_no_conv/motion'),
    ),
    Claim(
        'side4video_light',
        SIDE4VIDEO,
        'The light network takes less memory and loses little.',
        (
            Comparison('side4video_light/motion', 'side4video/motion', 'memory'),
            Comparison('side4video_light/motion', 'side4video/motion', wants=KEEPS),
        ),
    ),
    Claim(
        'side4video_retrieval',
        SIDE4VIDEO,
        'A side network beside the frozen image tower, with a text tower that is trained, finds '
        'videos by sentences, and sentences by videos, better than CLIP does frame by frame.',
        tuple(
            Comparison('retrieval/captions', 'retrieval_frozen/captions', figure)
            for figure in ('t2v_r1', 'v2t_r1')
        ),
    ),
    Claim(
        'sts_pictures',
        STS,
        'A network that was trained on pictures first learns videos better than from scratch.',
        _over('sts/motion', 'sts_scratch/motion'),
    ),
    Claim(
        'sts_separable',
        STS,
        'Space-time separable convolutions are better than the plain network, at equal cost.',
        (
            Comparison('sts/motion', 'sts_plain/motion'),
            Comparison('sts/motion', 'sts_plain/motion', 'compute_seconds', KEEPS),
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim, what became of its comparisons, and of it."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """One of HELD, NOT_HELD, NOISY and MISSING."""
        verdicts = [finding.verdict for finding in self.findings]
        for verdict in (NOT_HELD, MISSING, NOISY):
            if verdict in verdicts:
                return verdict
        return HELD


def judge_all(cells: Cells) -> list[Judged]:
    """All claims of which some comparison was run."""
    found = [
        Judged(claim, tuple(judge(cells, each) for each in claim.comparisons)) for claim in CLAIMS
    ]
    return [
        judged for judged in found if any(finding.verdict != MISSING for finding in judged.findings)
    ]


def judge(cells: Cells, comparison: Comparison) -> Finding:
    """What the figures say of a comparison."""
    figure = comparison.figure
    first, second = (cells.values(key, figure) for key in (comparison.first, comparison.second))
    if not first or not second:
        return Finding(MISSING)
    means = statistics.mean(first), statistics.mean(second)
    costs = figure in COSTS
    if costs:  # as shares of the second's
        first, second = ([-value / means[1] for value in values] for values in (first, second))
    difference = statistics.mean(first) - statistics.mean(second)
    sides = [
        values
        for key, values in ((comparison.first, first), (comparison.second, second))
        if figure not in EXACT and key.partition('/')[0] not in FIXED
    ]
    pooled = not costs and any(len(values) < 2 for values in sides)
    spread = spread_of(sides)
    if pooled:
        spread = max(filter(None, (main_spread(cells, comparison), spread)), default=None)
    if spread is None and sides:
        return Finding(NOISY, *means, difference, None, pooled)
    margin = 0.0
    if sides:
        deviation = max(spread.deviation, 0.0 if costs else _one_video(cells, comparison))
        error = deviation * math.sqrt(sum(1 / len(values) for values in sides))
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.freedom)) * error
    allowed = (COSTS_KEPT if costs else KEPT) if comparison.wants == KEEPS else 0.0
    if difference + margin < (-allowed or WORTH):
        verdict = NOT_HELD
    elif difference - margin > -allowed:
        verdict = HELD
    else:
        verdict = NOISY
    return Finding(verdict, *means, difference, margin, pooled)


def spread_of(groups: Iterable[Sequence[float]]) -> Spread | None:
    """The standard deviation within groups of several seeds; None without such a group."""
    groups = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return Spread(math.sqrt(squares / freedom), freedom)


def main_spread(cells: Cells, comparison: Comparison) -> Spread | None:
    """That of the main table on the data that the comparison is of."""
    data = cells.runs(comparison.first)[0]['data'].removesuffix('_new')
    return spread_of(cells.values(f'{name}/{data}', comparison.figure) for name in MAIN)


def _one_video(cells: Cells, comparison: Comparison) -> float:
    """Its share of the test list: no spread is known more finely than that."""
    videos = cells.values(comparison.first, 'num_videos')
    return 1 / videos[0] if videos else 0.0
