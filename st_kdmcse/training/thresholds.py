"""What the filter of false negatives removes, found out before a run of hours."""

from __future__ import annotations

from dataclasses import dataclass

from st_kdmcse.config import KDMCSEConfig, SoftLabel
from st_kdmcse.data.scores import negatives_removed
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.kdmcse import KDMCSELoss
from st_kdmcse.losses.teacher_scores import threshold_score


@dataclass(frozen=True)
class BranchFilter:
    """The filter of a branch, and its effect on a sample of the feature store.

    Attributes:
        branch: "image" or "caption".
        option: the field of :class:`~st_kdmcse.KDMCSEConfig` that sets the threshold.
        score: the teacher similarity that is compared with the threshold.
        threshold: the score from which a negative leaves.
        removed: share, from 0 to 1, of the negatives of other images that leave.
    """

    branch: str
    option: str
    score: SoftLabel
    threshold: float
    removed: float

    @property
    def removes_nothing(self) -> bool:
        """Whether no negative of the sample leaves."""
        return self.removed == 0

    def remedy(self, asked: KDMCSEConfig) -> str | None:
        """What to do about a filter that removes nothing; None where it removes something, or "auto" has found that.

        Args:
            asked: the options that the user gave, in which a threshold may be "auto".
        """
        if not self.removes_nothing or getattr(asked, self.option) == "auto":
            return None
        other = 'to "auto", or to a score that occurs' if asked.filter_calibration == "none" else "to a smaller share"
        return (
            f"the filter of the {self.branch} branch removes nothing: in a sample of the features no {self.score} "
            f"score of two images reaches {self.threshold:g}. Set `{self.option}` {other}"
        )

    def __str__(self) -> str:
        return (
            f"{self.branch} branch: the filter removes negatives with a {self.score} score from {self.threshold:.3f} "
            f"on, {100 * self.removed:.3g} % in a sample of the features"
        )


def branch_filters(loss: TwoViewLoss) -> list[BranchFilter]:
    """The filters of a loss with their effect on a sample of its feature store.

    Args:
        loss: any loss; one without a threshold or without a feature store gives an empty list.
    """
    if not isinstance(loss, KDMCSELoss) or loss.features is None:
        return []
    config, found = loss.config, []
    for branch, modality, score in (("image", "image", config.image_filter), ("caption", "text", config.text_filter)):
        threshold = threshold_score(config, modality, loss.statistics)
        if threshold is not None:
            removed = negatives_removed(
                loss.features, score, threshold, score=config.filter_score, inclusive=config.filter_inclusive
            )
            found.append(BranchFilter(branch, f"{modality}_threshold", score, threshold, removed))
    return found
