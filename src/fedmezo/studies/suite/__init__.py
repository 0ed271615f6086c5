"""The paper's tables and figures as studies: what is asked, which cells answer it, and what may be said of them.

A study is a TOML file: cells (factors times seeds), claims (each with the rule that judges it) and figures. `run_study`
does the cells that have no record yet; `write_site` judges all records and builds the pages. To be read in this order:
study (the file), cells (its expansion), kinds (what a cell does), execute, records, measures, rules, claims, lines,
site.
"""

from fedmezo.studies.suite.claims import Verdict, judge
from fedmezo.studies.suite.execute import Progress, check_one, run_study
from fedmezo.studies.suite.records import Store
from fedmezo.studies.suite.site import write_site
from fedmezo.studies.suite.study import SCALES, Study, load_studies, load_study
from fedmezo.studies.suite.words import protocol_of

__all__ = [
    "SCALES", "Progress", "Store", "Study", "Verdict", "check_one", "judge", "load_studies", "load_study",
    "protocol_of", "run_study", "write_site",
]  # fmt: skip
