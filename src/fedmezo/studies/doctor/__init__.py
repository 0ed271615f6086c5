"""Why a run is slow, noisy or diverging, from its journal alone."""

from fedmezo.studies.doctor.diagnose import diagnose
from fedmezo.studies.doctor.finding import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
