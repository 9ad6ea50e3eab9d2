"""A run's record, rendered: `Report` makes text, JSON and one HTML page of it.

Does not know models, caches or the runtime: a report is made from a run's plain data only.
"""

from moe_runtime.report.evaluation_report import EvaluationReport
from moe_runtime.report.parallel_report import PARALLEL_FORMAT, ParallelReport
from moe_runtime.report.plan_report import PlanReport
from moe_runtime.report.report import Report
from moe_runtime.report.run import RUN_FORMAT, RUN_VERSION, Counters, RunError
from moe_runtime.report.simulation_report import SimulationReport
from moe_runtime.report.steering_report import SteeringReport
from moe_runtime.report.summary import Summary

__all__ = [
    "PARALLEL_FORMAT",
    "RUN_FORMAT",
    "RUN_VERSION",
    "Counters",
    "EvaluationReport",
    "ParallelReport",
    "PlanReport",
    "Report",
    "RunError",
    "SimulationReport",
    "SteeringReport",
    "Summary",
]
