"""Image-text retrieval by a student and its heads: after a training, and while it goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from st_kdmcse.data.exclusion import read_left_out
from st_kdmcse.data.layout import ROWS_PER_CHUNK
from st_kdmcse.data.store import FeatureStore
from st_kdmcse.encoding import Matrix, encode_distinct, load_model
from st_kdmcse.evaluation.retrieval import Retrieval, evaluate_retrieval
from st_kdmcse.files import progress_bar
from st_kdmcse.losses.grounded import GroundedLoss
from st_kdmcse.losses.heads import HEADS_DIR, ProjectionHead, load_head

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
        texts = project_captions(self.store, model, heads["grounding"], False)
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
    store: FeatureStore, student: SentenceTransformer, head: ProjectionHead, show_progress_bar: bool | None = None
) -> Matrix:
    """The captions of a store in the space of the images.

    Args:
        store: N captions.
        student: the trained encoder.
        head: grounding.
        show_progress_bar: None shows one in a terminal, after two seconds.

    Returns:
        (N, projection) float32, not normalised.
    """
    captions = [caption for _, caption in store.captions()]
    return _projected(encode_distinct(student, captions, show_progress_bar=show_progress_bar)(captions), head)


def _projected(vectors: Matrix, head: ProjectionHead) -> Matrix:
    """What a head makes of vectors, in float32 even where a training computes in less."""
    device = head.dense.weight.device
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        projected: Matrix = head(torch.from_numpy(vectors).to(device)).float().cpu().numpy()
    return projected


def image_text_retrieval(
    run: str | Path, features: str | Path, only: str | Path | None = None, folds: int = 1, device: str | None = None
) -> dict[str, dict[str, Retrieval]]:
    """Retrieval in both directions by a trained student and its heads, and by the teacher.

    Args:
        run: folder of the student, with its heads.
        features: a feature store of the teacher of the training, with images that were not trained on.
        only: a list of images of the store, as ``exclude_images`` of a training takes it; None is all.
        folds: as for :func:`~st_kdmcse.evaluation.retrieval.evaluate_retrieval`.
        device: of the student; a GPU if there is one.

    Returns:
        The results by direction, of the "student", and of the "teacher" where its texts and images are of one space.

    Raises:
        FileNotFoundError: if the student, its heads, the features or the list are missing.
        ValueError: if the heads do not fit, or the list is malformed.
    """
    store = FeatureStore.open(features)
    rows = np.arange(len(store)) if only is None else read_left_out(only, store).rows
    images, image_rows = np.unique(store.image_rows[rows], return_inverse=True)
    grounding, of_images = (
        load_head(Path(run) / HEADS_DIR, "grounding"),
        load_head(Path(run) / HEADS_DIR, "teacher_image"),
    )
    if of_images.dense.in_features != store.dim:
        raise ValueError(
            f"the heads in {Path(run) / HEADS_DIR} take features of width {of_images.dense.in_features}, those of "
            f"{store.path} are of width {store.dim}: give features of the teacher that they were trained with"
        )
    student = load_model(str(run), device)
    texts, pictures = project_captions(store, student, grounding), project_images(store, of_images)
    results = {"student": evaluate_retrieval(texts[rows], pictures[images], image_rows, folds)}
    if store.shared_space:
        of_texts = np.asarray(store.text_features[store.text_rows[rows]], dtype=np.float32)
        results["teacher"] = evaluate_retrieval(of_texts, store.image_features[images], image_rows, folds)
    return results
