"""Tiny encoders of every kind with random weights and tokenizers of their own kind, in folders as the hub has them."""

from pathlib import Path

import torch
from helpers import WORDS
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AlbertConfig,
    AlbertTokenizer,
    AutoModel,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2Tokenizer,
    DistilBertConfig,
    DistilBertTokenizer,
    ElectraConfig,
    ElectraTokenizer,
    ModernBertConfig,
    MPNetConfig,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
_POSITIONS = {"max_position_embeddings": 48}
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _numbered(tokens):
    return {token: number for number, token in enumerate(tokens)}


def _bert_like(kind):
    return kind(vocab=_numbered([*_BERT, *WORDS]))


def _byte_level():
    return RobertaTokenizer(vocab=_numbered([*_FAIRSEQ, *sorted(ByteLevel.alphabet())]), merges=[])


def _unigram(kind, special):
    pieces = [f"▁{word}" for word in WORDS] + ["▁", *sorted(set("".join(WORDS)))]
    return kind(vocab=[(piece, 0.0) for piece in special] + [(piece, -float(len(WORDS))) for piece in pieces])


def _modern():
    bert = _bert_like(BertTokenizer)
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": token for name, token in zip(names, _BERT, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer, **special)


_DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, **_POSITIONS}
_DROPOUTS = {"embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
ENCODERS = {
    "bert": (BertConfig, {**_SIZES, **_POSITIONS}, lambda: _bert_like(BertTokenizer)),
    "roberta": (RobertaConfig, {**_SIZES, **_POSITIONS}, _byte_level),
    "xlm-roberta": (XLMRobertaConfig, {**_SIZES, **_POSITIONS}, lambda: _unigram(XLMRobertaTokenizer, _FAIRSEQ)),
    "distilbert": (DistilBertConfig, _DISTIL, lambda: _bert_like(DistilBertTokenizer)),
    "electra": (ElectraConfig, {**_SIZES, **_POSITIONS, "embedding_size": 8}, lambda: _bert_like(ElectraTokenizer)),
    "mpnet": (
        MPNetConfig,
        {**_SIZES, **_POSITIONS},
        lambda: MPNetTokenizer(vocab=_numbered([*_FAIRSEQ, "[UNK]", *WORDS])),
    ),
    "albert": (
        AlbertConfig,
        {**_SIZES, **_POSITIONS, "embedding_size": 8, "hidden_dropout_prob": 0.1},
        lambda: _unigram(AlbertTokenizer, ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]),
    ),
    "deberta-v2": (
        DebertaV2Config,
        {**_SIZES, **_POSITIONS, **_DEBERTA},
        lambda: _unigram(DebertaV2Tokenizer, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]),
    ),
    "modernbert": (ModernBertConfig, {**_SIZES, **_POSITIONS, **_DROPOUTS, "global_attn_every_n_layers": 2}, _modern),
}
"""By type: configuration, its sizes, and what makes the tokenizer."""


def make_encoder(kind: str, folder: Path, **changes) -> Path:
    """Save an encoder of a type in :data:`ENCODERS`; ``changes`` are those of its configuration."""
    config, sizes, make_tokenizer = ENCODERS[kind]
    tokenizer = make_tokenizer()
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")
    }
    given = {name: value for name, value in special.items() if value is not None}
    torch.manual_seed(0)
    AutoModel.from_config(config(vocab_size=len(tokenizer), **{**given, **sizes, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
