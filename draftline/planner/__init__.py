"""What a run will cost in bytes, GPU-hours and money, before anything runs; without tensors, mostly without network."""

from draftline.planner.hardware import PROFILES, HardwareProfile, hardware_profile
from draftline.planner.plan import Assumptions, Corpus, Plan, Prices, Serving, Throughput, make_plan
from draftline.planner.targets import KNOWN_CONFIGS, TargetFacts, target_facts

__all__ = [
    "KNOWN_CONFIGS",
    "PROFILES",
    "Assumptions",
    "Corpus",
    "HardwareProfile",
    "Plan",
    "Prices",
    "Serving",
    "TargetFacts",
    "Throughput",
    "hardware_profile",
    "make_plan",
    "target_facts",
]
