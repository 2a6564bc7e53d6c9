"""Frozen teachers whose embeddings of images and captions the losses distil."""

from st_kdmcse.teachers.base import ModelTeacher, Teacher, TeacherImage, TeacherPrecision, load_pixels
from st_kdmcse.teachers.clip import CLIPTeacher
from st_kdmcse.teachers.combined import CombinedTeacher
from st_kdmcse.teachers.load import load_teacher
from st_kdmcse.teachers.openclip import OpenCLIPTeacher
from st_kdmcse.teachers.sentence_transformer import SentenceTransformerTeacher

__all__ = [
    "CLIPTeacher",
    "CombinedTeacher",
    "ModelTeacher",
    "OpenCLIPTeacher",
    "SentenceTransformerTeacher",
    "Teacher",
    "TeacherImage",
    "TeacherPrecision",
    "load_pixels",
    "load_teacher",
]
