"""Selective synaptic dampening: shrink the weights that matter most to the forget rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.descent import stack
from attribution.task import State
from unlearning.method import Plan, Request, check_positive
from unlearning.row_gradients import mean_squared_gradients, own_module
from unlearning.runner import UnlearningMethod


@dataclass(frozen=True)
class SelectiveSynapticDampening(UnlearningMethod):
    """SSD: changes weights in one go, without a step of training.

    With I_D and I_F the mean squared gradients of the loss over all rows and over the forget
    rows, each weight for which I_F > selection I_D is multiplied by
    min(dampening I_D / I_F, 1).

    Args:
        selection: how much more a weight must matter to the forget rows; the paper's alpha.
        dampening: the smaller, the more such a weight shrinks; the paper's lambda.

    Raises:
        ValueError: a number is outside its range.

    Source: SSD (arXiv 2308.07707); the importances here are means over single rows.
    """

    selection: float = 10.0
    dampening: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, ("selection", "dampening"))

    def plan(self, request: Request) -> Plan:
        """No steps: they would start, and end, with the dampened weights."""
        forget, retain = request.rows(request.forget.rows), request.rows(request.wanted.retained)
        models = range(len(request.numbers))
        loss = request.task.loss
        return Plan(
            inputs=forget[0],
            labels=forget[1],
            order=np.zeros((len(models), 0, 1), dtype=np.int64),
            rates=np.zeros(0),
            cotangent=lambda outputs, y, _: loss.gradient(outputs, y),
            value=lambda outputs, y, _: loss.value(outputs, y),
            start=stack([self._dampened(request, i, forget, retain) for i in models]),
            spent=len(forget[0]) + len(retain[0]),
        )

    @torch.no_grad()
    def _dampened(
        self,
        request: Request,
        index: int,
        forget: tuple[Tensor, Tensor],
        retain: tuple[Tensor, Tensor],
    ) -> State:
        module, loss = own_module(request, index), request.task.loss
        with torch.enable_grad():
            of_forget, of_retain = (
                mean_squared_gradients(module, loss, *rows) for rows in (forget, retain)
            )
        share = len(forget[0]) / (len(forget[0]) + len(retain[0]))
        for name, weight in module.named_parameters():
            if name in of_forget:
                of_all = share * of_forget[name] + (1 - share) * of_retain[name]
                weight.mul_(self._factor(of_forget[name], of_all))
        return module.state_dict()

    def _factor(self, of_forget: Tensor, of_all: Tensor) -> Tensor:
        shrunk = (self.dampening * of_all / of_forget).clamp_max(1)
        return torch.where(of_forget > self.selection * of_all, shrunk, torch.ones_like(shrunk))
