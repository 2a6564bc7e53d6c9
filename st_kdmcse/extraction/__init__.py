"""Teacher features of whole data sets: resumable, sharded, byte for byte repeatable."""

from st_kdmcse.extraction.extract import ExtractionReport, extract
from st_kdmcse.extraction.merge import merge
from st_kdmcse.extraction.options import ExtractionOptions, extract_dataset

__all__ = ["ExtractionOptions", "ExtractionReport", "extract", "extract_dataset", "merge"]
