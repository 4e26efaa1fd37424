"""One study from beginning to end, and the page that shows it."""

from symflow.report.demo import demo
from symflow.report.figures import draw
from symflow.report.study import StudySettings, study

__all__ = ["StudySettings", "demo", "draw", "study"]
