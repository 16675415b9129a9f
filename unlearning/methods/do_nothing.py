"""Do nothing: the reference every method must beat."""

from dataclasses import dataclass

from unlearning.method import Plan, Request
from unlearning.runner import UnlearningMethod


@dataclass(frozen=True)
class DoNothing(UnlearningMethod):
    """Leaves the model as it is."""

    def plan(self, request: Request) -> Plan | None:
        """No steps."""
        del request
        return None
