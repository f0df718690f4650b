"""What a run needs, before it is started: memory of every card, work and traffic of a step."""

from __future__ import annotations

from glm_ms.plan.planned_parameters import planned_parameters
from glm_ms.plan.run_plan import GIB, RunPlan, describe, plan_run
from glm_ms.plan.search import nearest_fit

__all__ = ["GIB", "RunPlan", "describe", "nearest_fit", "plan_run", "planned_parameters"]
