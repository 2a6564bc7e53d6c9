"""A small world of captioned shape scenes with a trained CLIP teacher, for demos and tests without downloads."""

from st_kdmcse.demo.run import QUICK, TEACHER_DIR, make_demo_data, minilm_folder, run_demo

__all__ = ["QUICK", "TEACHER_DIR", "make_demo_data", "minilm_folder", "run_demo"]
