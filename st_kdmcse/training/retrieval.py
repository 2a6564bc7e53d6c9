"""Image-text retrieval by a student and its heads: after a training, and while it goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from st_kdmcse.data.cxc import SITSPairs, image_number
from st_kdmcse.data.exclusion import read_left_out
from st_kdmcse.data.layout import ROWS_PER_CHUNK
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.encoding import Matrix, encode_distinct
from st_kdmcse.evaluation.cxc import CxCResult, score_sits
from st_kdmcse.evaluation.retrieval import Retrieval, evaluate_retrieval
from st_kdmcse.files import progress_bar
from st_kdmcse.losses.grounded import GroundedLoss
from st_kdmcse.losses.heads import ProjectionHead, load_head
from st_kdmcse.precision import Precision

logger = logging.getLogger(__name__)


class ImageTextRetrievalEvaluator(SentenceEvaluator):
    """Image-text retrieval as an evaluator for training, by the student and the heads of its loss as they are then.

    The metrics are ``{name}_text_to_image_recall@k`` and ``{name}_image_to_text_recall@k`` for k = 1, 5 and 10, from 0
    to 1, and ``{name}_mean_recall``, the mean of the six, which is the primary metric.

    Args:
        store: images with captions that are not trained on, with features of the teacher of the training.
        loss: what is trained, ``KDMCSELoss`` or ``MCSELoss``.
        name: first part of the metrics' names.
        folds: as for :func:`~st_kdmcse.evaluation.retrieval.evaluate_retrieval`.

    Raises:
        ValueError: if the loss has no heads for images, or for features of another width.

    Example:
        .. code-block:: python

            evaluator = ImageTextRetrievalEvaluator(FeatureStore.open("flickr30k-val-features"), loss)
            KDMCSETrainer(model, arguments, train_dataset=data, loss=loss, evaluator=evaluator).train()
    """

    def __init__(self, store: FeatureStore, loss: GroundedLoss, name: str = "retrieval", folds: int = 1) -> None:
        super().__init__()
        if "teacher_image" not in loss.heads:
            raise ValueError("the loss has no heads for images: its `multimodal_weight` is 0")
        if loss.teacher_dim != store.dim:
            raise ValueError(
                f"the loss takes features of width {loss.teacher_dim}, those of {store.path} are of width {store.dim}: "
                "give features of the teacher of the training"
            )
        self.store = store
        self.loss = loss
        self.name = name
        self.folds = folds
        self.primary_metric = "mean_recall"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a model.

        Args:
            model: the student.
            output_path: not used.
            epoch: for the model card.
            steps: for the model card.
        """
        heads = cast("dict[str, ProjectionHead]", self.loss.heads)
        captions = [caption for _, caption in self.store.captions()]
        texts = project_captions(captions, model, heads["grounding"], False)
        images = project_images(self.store, heads["teacher_image"], False)
        found = evaluate_retrieval(texts, images, self.store.image_rows, self.folds)
        metrics = {
            f"{direction.replace(' ', '_')}_recall@{k}": recall / 100
            for direction, result in found.items()
            for k, recall in result.recall.items()
        }
        metrics["mean_recall"] = float(np.mean(list(metrics.values())))
        logger.info("%s: mean recall x 100 %.2f", self.name, 100 * metrics["mean_recall"])
        prefixed: dict[str, float] = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, prefixed, epoch, steps)
        return prefixed

    @property
    def description(self) -> str:
        """What the model card calls it."""
        return "Image-Text Retrieval"


def project_images(store: FeatureStore, head: ProjectionHead, show_progress_bar: bool | None = None) -> Matrix:
    """The images of a store in the space of the sentences.

    Args:
        store: M images.
        head: teacher_image.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        (M, projection) float32, not normalised.
    """
    features = store.image_features
    embeddings = np.empty((len(features), head.dense.out_features), dtype=np.float32)
    with progress_bar(len(features), "Projecting images", "image", show_progress_bar) as progress:
        for start in range(0, len(features), ROWS_PER_CHUNK):
            chunk = np.array(features[start : start + ROWS_PER_CHUNK], dtype=np.float32)
            embeddings[start : start + len(chunk)] = _projected(chunk, head)
            progress.update(len(chunk))
    return embeddings


def project_captions(
    captions: Sequence[str],
    student: SentenceTransformer,
    head: ProjectionHead,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> Matrix:
    """Captions in the space of the images.

    Args:
        captions: N captions.
        student: the trained encoder.
        head: grounding.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: of the student, as for :func:`~st_kdmcse.encoding.encode_distinct`.

    Returns:
        (N, projection) float32, not normalised.
    """
    vectors = encode_distinct(student, captions, show_progress_bar=show_progress_bar, precision=precision)(captions)
    return _projected(vectors, head)


def _projected(vectors: Matrix, head: ProjectionHead) -> Matrix:
    """What a head makes of vectors, in float32 even where a training computes in less."""
    device = head.dense.weight.device
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        projected: Matrix = head(torch.from_numpy(vectors).to(device)).float().cpu().numpy()
    return projected


class RetrievalHeads(NamedTuple):
    """The heads by which sentences and images meet: "grounding" and "teacher_image"."""

    grounding: ProjectionHead
    teacher_image: ProjectionHead

    @classmethod
    def load(cls, folder: str | Path, store: FeatureStore) -> RetrievalHeads:
        """Read both, for the features of a store.

        Args:
            folder: of the heads, such as ``kdmcse-bert/heads``.
            store: features of the teacher that they were trained with.

        Raises:
            FileNotFoundError: if there are no heads.
            ValueError: if one is missing, or the features are of another width.
        """
        heads = cls(load_head(folder, "grounding"), load_head(folder, "teacher_image"))
        width = heads.teacher_image.dense.in_features
        if width != store.dim:
            raise ValueError(
                f"the heads in {folder} take features of width {width}, those of {store.path} are of width "
                f"{store.dim}: give features of the teacher that they were trained with"
            )
        return heads


def image_text_retrieval(
    student: SentenceTransformer,
    heads: RetrievalHeads,
    store: FeatureStore,
    only: str | Path | None = None,
    folds: int = 1,
) -> dict[str, dict[str, Retrieval]]:
    """Retrieval in both directions by a trained student and its heads, and by the teacher.

    Args:
        student: the trained encoder.
        heads: that were trained with it.
        store: features of the teacher of the training, of images that were not trained on.
        only: a list of images of the store, as ``exclude_images`` of a training takes it; None is all.
        folds: as for :func:`~st_kdmcse.evaluation.retrieval.evaluate_retrieval`.

    Returns:
        The results by direction, of the "student", and of the "teacher" where its texts and images are of one space.

    Raises:
        FileNotFoundError: if the list is missing.
        ValueError: if it is malformed, or the folds are not of one size.
    """
    rows = np.arange(len(store)) if only is None else read_left_out(only, store).rows
    images, image_rows = np.unique(store.image_rows[rows], return_inverse=True)
    chosen = set(rows.tolist())
    captions = [caption for row, (_, caption) in enumerate(store.captions()) if row in chosen]
    texts = project_captions(captions, student, heads.grounding)
    pictures = project_images(store, heads.teacher_image)
    results = {"student": evaluate_retrieval(texts, pictures[images], image_rows, folds)}
    if store.shared_space:
        of_texts = np.asarray(store.text_features[store.text_rows[rows]], dtype=np.float32)
        results["teacher"] = evaluate_retrieval(of_texts, store.image_features[images], image_rows, folds)
    return results


def caption_image_similarity(
    student: SentenceTransformer,
    heads: RetrievalHeads,
    store: FeatureStore,
    pairs: SITSPairs,
    seed: int = 0,
    precision: Precision = "float32",
) -> CxCResult:
    """Score a trained student and its heads on pairs of a caption and an image of CxC.

    Args:
        student: the trained encoder.
        heads: that were trained with it.
        store: features of the images, of the teacher of the training.
        pairs: what :func:`~st_kdmcse.data.load_sits` returns.
        seed: of the bootstrap.
        precision: of the student.

    Raises:
        ValueError: if the store lacks an image; names it.
    """
    rows_of: dict[str | int, int] = {}
    for row, (image, _) in zip(store.image_rows.tolist(), store.captions(), strict=True):
        rows_of[_key(image)] = row
    missing = list(dict.fromkeys(image for image in pairs.images if _key(image) not in rows_of))
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(set(pairs.images)):,} images are not in the feature store {store.path}, the "
            f"first is {missing[0]}: extract the features of all of them"
        )
    texts = project_captions(pairs.captions, student, heads.grounding, precision=precision)
    images = project_images(store, heads.teacher_image)
    return score_sits(pairs, texts, images[[rows_of[_key(image)] for image in pairs.images]], seed=seed)


def _key(image: str) -> str | int:
    """What names of an image of MS-COCO have in common."""
    number = image_number(image)
    return image if number is None else number
