"""BibTeX entries that the model card prints."""

SIMCSE = """
@inproceedings{gao2021simcse,
    title = {{SimCSE}: Simple Contrastive Learning of Sentence Embeddings},
    author = {Gao, Tianyu and Yao, Xingcheng and Chen, Danqi},
    booktitle = {Proceedings of EMNLP},
    year = {2021},
    url = {https://arxiv.org/abs/2104.08821},
}
"""

ARCCSE = """
@inproceedings{zhang2022arccse,
    title = {A Contrastive Framework for Learning Sentence Representations from Pairwise and Triple-wise Perspective in
             Angular Space},
    author = {Zhang, Yuhao and Zhu, Hongji and Wang, Yongliang and Xu, Nan and Li, Xiaobo and Zhao, Binqiang},
    booktitle = {Proceedings of ACL},
    year = {2022},
    url = {https://aclanthology.org/2022.acl-long.336/},
}
"""

MCSE = """
@inproceedings{zhang2022mcse,
    title = {{MCSE}: Multimodal Contrastive Learning of Sentence Embeddings},
    author = {Zhang, Miaoran and Mosbach, Marius and Adelani, David Ifeoluwa and Hedderich, Michael A. and
              Klakow, Dietrich},
    booktitle = {Proceedings of NAACL},
    year = {2022},
    url = {https://arxiv.org/abs/2204.10931},
}
"""

KDMCSE = """
@inproceedings{nguyen2024kdmcse,
    title = {{KDMCSE}: Knowledge Distillation Multimodal Sentence Embeddings with Adaptive Angular margin Contrastive
             Learning},
    author = {Nguyen, Cong-Duy and Nguyen, Thong and Wu, Xiaobao and Luu, Anh Tuan},
    booktitle = {Proceedings of NAACL},
    pages = {733--749},
    year = {2024},
    url = {https://arxiv.org/abs/2403.17486},
}
"""

GRADIENT_CACHE = """
@inproceedings{gao2021scaling,
    title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author = {Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},
    booktitle = {Proceedings of the 6th Workshop on Representation Learning for NLP (RepL4NLP)},
    year = {2021},
    url = {https://arxiv.org/abs/2101.06983},
}
"""
