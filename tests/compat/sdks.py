"""The SDK versions of the table, and the environment of each."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

LOCKS = Path(__file__).parent / "locks"
NODE = ROOT / ".tools" / "sdks" / "node" / "bin" / "node"
INSTALL_SECONDS = 600.0


@dataclass(frozen=True)
class Sdk:
    """`name` is that of its lock; `quick`: `make test` runs it, not `make compat` alone."""

    name: str
    package: str
    programs: tuple[str, ...]
    quick: bool = False

    @property
    def npm(self) -> bool:
        return self.name.startswith("npm-")

    @property
    def home(self) -> Path:
        return ROOT / ".tools" / "sdks" / self.name

    @property
    def title(self) -> str:
        """As the table says it, with the version of the lock: what is not named is llama-stack-client."""
        package = self.package.removeprefix("llama-stack-client").removesuffix("-client")
        return " ".join(filter(None, [package, "npm" if self.npm else "py", self._version()]))

    def command(self, program: str) -> list[str]:
        """What runs one of its programs."""
        interpreter = NODE if self.npm else self.home / "bin" / "python"
        return [str(interpreter), str(Path(__file__).parent / "programs" / program)]

    def _version(self) -> str:
        if self.npm:
            locked = json.loads((LOCKS / self.name / "package-lock.json").read_text())
            return str(locked["packages"][f"node_modules/{self.package}"]["version"])
        [version] = re.findall(rf"^{self.package}==(\S+)", (LOCKS / f"{self.name}.txt").read_text(), re.MULTILINE)
        return str(version)


SDKS = (
    Sdk("llama-stack-client-0.1.9", "llama-stack-client", ("agents_02.py",)),
    Sdk("llama-stack-client-0.2.2", "llama-stack-client", ("agents_02.py",)),
    Sdk("llama-stack-client-0.2.12", "llama-stack-client", ("agents_02.py",)),
    Sdk("llama-stack-client-0.2.23", "llama-stack-client", ("agents_02.py",), quick=True),
    Sdk("llama-stack-client-0.3.5", "llama-stack-client", ("agents_03.py", "responses_py.py"), quick=True),
    Sdk("llama-stack-client-0.7.5", "llama-stack-client", ("responses_py.py",), quick=True),
    Sdk("ogx-client-1.5", "ogx-client", ("responses_py.py",)),
    Sdk("openai", "openai", ("openai_py.py",), quick=True),
    Sdk("npm-llama-stack-client-0.2.7", "llama-stack-client", ("agents.mjs",), quick=True),
    Sdk("npm-llama-stack-client-0.2.23", "llama-stack-client", ("agents.mjs",), quick=True),
    Sdk("npm-llama-stack-client-0.3.0", "llama-stack-client", ("agents.mjs",), quick=True),
    Sdk("npm-llama-stack-client-0.7.3", "llama-stack-client", ("responses.mjs",), quick=True),
    Sdk("npm-openai", "openai", ("responses.mjs",), quick=True),
)


def install(sdks: Sequence[Sdk]) -> None:
    """Sets up the environments that are missing or older than their locks, and ends in a second if there are none."""
    names = [sdk.name for sdk in sdks]
    subprocess.run([ROOT / ".ci" / "setup", "sdks", *names], cwd=ROOT, check=True, timeout=INSTALL_SECONDS)
