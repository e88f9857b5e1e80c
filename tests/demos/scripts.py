"""What the scripted model says to the programs' questions, by a part of each question."""

from __future__ import annotations

import json


def python(*lines: str) -> str:
    """A call of the code interpreter."""
    return f"CALL code_interpreter {json.dumps({'code': chr(10).join(lines)})}"


def search(query: str) -> str:
    """A search of documents."""
    return f"CALL knowledge_search {json.dumps({'query': query})}"


def web(query: str) -> str:
    return f"CALL web_search {json.dumps({'query': query})}"


READ = ("import glob, pandas as pd", "data = pd.read_csv(glob.glob('*.csv')[0]).set_index('Year')")
DESCRIBE = python(*READ, "print(data.shape)")
HIGHEST = python(*READ, "print('highest in', data['Dec'].idxmax())")
PLOT = python(
    *READ,
    "import matplotlib.pyplot as plt",
    "data.mean(axis=1).plot(title='Inflation')",
    "plt.savefig('inflation.png')",
)
