"""The constants of the noise score, each with where it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """All constants of the noise score. docs/research/detection.md has the trials behind them.

    Attributes:
        shrinkages: shares of the covariance that may be replaced by its mean variance; the labels choose one.
        sharpenings: how much surer of the true class the evidence may be than it is of the label, as powers
            of its probabilities: from none to more than any trial asked for (3, at 30 % noise among classes
            that are easy to tell apart).
        affinities: how much more readily a wrong label is one that resembles the sample, as powers of its
            probability. 0 is noise that looks at the true class alone; human labels fitted 0.1 to 0.2 best.
        tempering: power of a noise model's likelihood, as no model is quite right. Nearer to 1 the
            interval of the rate held the truth in 60 % of 15 small settings, at 0.1 in 92 % of 78.
        clean_share: how probable it is beforehand that all labels are right, over all noise models together.
        smallest_share: noise models that weigh less than this share of the most probable one are left out of
            the average.
        quick_models: most of them that are averaged where time counts.
        rounds: fits of the class Gaussians, in each of which suspects count less than before. On embeddings
            the second raised average precision by 0.011, the third by 0.001.
        least_weight: of a suspect in these fits.
        trust_power: evidence that has seen the labels counts as the ratio of its loss and that of evidence
            that has not, smaller over larger, to this power. Powers from 1 to 4 ranked alike.
        fitted_rows, fitted_entries: samples, and samples times classes times annotators, that noise models
            are fitted to. Only for time.
        most_paired: with more classes than this, it is not asked which ones are mistaken for which.
        strengths: imaginary samples per class behind what all classes share; the counts choose one.
        steps, refits: of expectation maximisation; every so many steps the strengths are chosen anew.
        tolerance: change of the mean log-likelihood, in nats, below which it ends.
        first_noise: where that starts.
        correlation: of the mistakes of several annotators. Of three that made as many together as those of
            CIFAR-10N, 0.1 found 6.5 % of 8.5 % wrong majorities, 0 5.2 %; of three less alike, 9.1 and 6.5 %
            of 7.0 %.
        least_explained: share of the labels' entropy that evidence must explain for any verdict.
        most_memorised: share of the likely wrong labels that a network may predict all the same before they
            are called learned by heart. At most 0.33 in the trials; without augmentation it is little tried.
        deviations: half the width of the rate's interval, in standard deviations.
        least_precision: flags shall be right at least this often.
        widest_rate: width of the rate's interval from which a person is told that it says little. In the
            20 of 166 trials that had more, the rate was off by 0.12 (median; the others 0.01 to 0.04), and F1
            of the flags 0.74 of the best cut's (0.85 to 0.96).
    """

    shrinkages: tuple[float, ...] = (0.03, 0.1, 0.3, 0.6, 0.9)
    sharpenings: tuple[float, ...] = (1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 3.0, 4.0, 6.0)
    affinities: tuple[float, ...] = (0.0, 0.1, 0.2)
    tempering: float = 0.1
    clean_share: float = 1 / 3
    smallest_share: float = 0.05
    quick_models: int = 3
    rounds: int = 3
    least_weight: float = 0.01
    trust_power: float = 2.0
    fitted_rows: int = 10_000
    fitted_entries: int = 2_000_000
    most_paired: int = 100
    strengths: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4)
    steps: int = 40
    tolerance: float = 1e-6
    refits: int = 5
    first_noise: float = 0.2
    correlation: float = 0.1
    least_explained: float = 0.02
    most_memorised: float = 0.5
    deviations: float = 2.0
    least_precision: float = 0.5
    widest_rate: float = 0.3


SETTINGS = ScoreSettings()
