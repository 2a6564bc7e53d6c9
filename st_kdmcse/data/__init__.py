"""Reading and keeping data: sentences, teacher features with their captions, STS pairs."""

from st_kdmcse.data.files import sha256_file
from st_kdmcse.data.released import import_released_json
from st_kdmcse.data.sentences import read_sentences
from st_kdmcse.data.store import FeatureBatch, FeatureStore
from st_kdmcse.data.sts import STSPairs, load_sts_benchmark
from st_kdmcse.data.thresholds import true_pair_score
from st_kdmcse.data.writer import FeatureStoreWriter

__all__ = [
    "FeatureBatch",
    "FeatureStore",
    "FeatureStoreWriter",
    "STSPairs",
    "import_released_json",
    "load_sts_benchmark",
    "read_sentences",
    "sha256_file",
    "true_pair_score",
]
