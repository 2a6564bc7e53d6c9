"""Reading and keeping data: sentences, teacher features with their captions, STS pairs."""

from st_kdmcse.data.cxc import load_cxc, load_sits
from st_kdmcse.data.inspection import StoreReport, inspect_store
from st_kdmcse.data.readers import (
    BadRowError,
    CaptionedImage,
    CaptionsCSV,
    CaptionTable,
    Coco,
    FlickrCSV,
    FlickrEntities,
    FlickrTokens,
    HubDataset,
    ImageCaptionReader,
    Karpathy,
    WebDataset,
    open_captions,
)
from st_kdmcse.data.released import import_released_json
from st_kdmcse.data.scores import true_pair_score
from st_kdmcse.data.sentences import iter_sentences, read_sentences
from st_kdmcse.data.store import FeatureBatch, FeatureStore
from st_kdmcse.data.sts import STS_TASKS, STSPairs, STSTask, load_sts_benchmark, load_sts_tasks
from st_kdmcse.data.writer import FeatureStoreWriter
from st_kdmcse.files import sha256_file

__all__ = [
    "STS_TASKS",
    "BadRowError",
    "CaptionTable",
    "CaptionedImage",
    "CaptionsCSV",
    "Coco",
    "FeatureBatch",
    "FeatureStore",
    "FeatureStoreWriter",
    "FlickrCSV",
    "FlickrEntities",
    "FlickrTokens",
    "HubDataset",
    "ImageCaptionReader",
    "Karpathy",
    "STSPairs",
    "STSTask",
    "StoreReport",
    "WebDataset",
    "import_released_json",
    "inspect_store",
    "iter_sentences",
    "load_cxc",
    "load_sits",
    "load_sts_benchmark",
    "load_sts_tasks",
    "open_captions",
    "read_sentences",
    "sha256_file",
    "true_pair_score",
]
