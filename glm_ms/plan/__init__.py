"""What a run needs, before it is started: memory of every card, work and traffic of a step."""

from __future__ import annotations

from glm_ms.plan.planned_parameters import PlannedParameter, planned_parameters
from glm_ms.plan.report import describe
from glm_ms.plan.run_plan import CardMemory, RunPlan, plan_run
from glm_ms.plan.search import nearest_fit

__all__ = [
    "CardMemory",
    "PlannedParameter",
    "RunPlan",
    "describe",
    "nearest_fit",
    "plan_run",
    "planned_parameters",
]
