"""One attempt at a turn: decide, do, record, until the leg ends.

`attempt` owns the turn and records; `agent_turn` and `response` are the two kinds of turns; `inference`, `tools` and
`mcp` do. Agents follow llama_stack's `ChatAgent`, whose deviations `tests/conformance` lists.
"""

from app.domain.turns import TurnKind
from app.store.claims import Claim
from tasks.engine.agent_turn import AgentTurn
from tasks.engine.attempt import Attempt, Tools
from tasks.engine.response import Response


def attempt_of(given: Tools, claim: Claim) -> Attempt:
    """Raises whatever reading the turn raises."""
    return AgentTurn(given, claim) if claim.kind == TurnKind.AGENT else Response(given, claim)
